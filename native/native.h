/* What the files of fastsplit._native share. docs/architecture.md says what is compiled and why. */

#ifndef FASTSPLIT_NATIVE_H
#define FASTSPLIT_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* How an attribute travels: in the message's text, or as a number; `Heads.add` is told by these. */
enum Kind { FIXED, INT, BOOL, FLOAT };

/* Numbers of a message: little-endian, at any address. */
static inline uint64_t native_read(const unsigned char *at, int nbytes) {
    uint64_t number = 0;
    for (int i = 0; i < nbytes; i++) number |= (uint64_t)at[i] << 8 * i;
    return number;
}

static inline void native_write(unsigned char *at, uint64_t number, int nbytes) {
    for (int i = 0; i < nbytes; i++) at[i] = (unsigned char)(number >> 8 * i);
}

/* Made when the module is imported, and never changed. */
extern PyObject *native_PeerLostError;          /* fastsplit.errors.PeerLostError */
extern PyObject *native_pack_header_reference;  /* fastsplit.schema.header.pack_header */
extern PyObject *native_parse_header_reference; /* fastsplit.schema.header.parse_header */
extern PyObject *native_str_slot, *native_str_max_metadata_nbytes, *native_str_max_message_nbytes;

PyObject *native_pack_header(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *native_parse_header(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *native_share(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
int native_init_tensors(void); /* 0 with an error */

extern PyType_Spec native_slots_spec, native_templates_spec, native_heads_spec;

#endif
