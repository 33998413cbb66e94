/* The header of a frame: what fastsplit/schema/header.py does; read that first.
 *
 * Rules. A header is accepted only if Python would accept it. One that is not goes to the Python function, which raises
 * the error that says why.
 */

#include "native.h"

#include <string.h>

enum {
    HEADER_NBYTES = 40,
    VERSION = 1,
    LAST_KIND = 12,
    REQUEST = 2,
};

static int limit_of(PyObject *limits, PyObject *name, uint64_t *limit) {
    PyObject *found = PyObject_GetAttr(limits, name);
    if (found == NULL) return 0;
    *limit = PyLong_AsUnsignedLongLong(found); /* Limits are ints of 63 bits */
    Py_DECREF(found);
    return !PyErr_Occurred();
}

PyObject *native_parse_header(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3 && nargs != 4) {
        PyErr_Format(PyExc_TypeError, "parse_header: %zd arguments, expected 3 or 4", nargs);
        return NULL;
    }
    Py_ssize_t at = PyLong_AsSsize_t(args[1]);
    if (at == -1 && PyErr_Occurred()) return NULL;
    uint64_t known_flags = nargs == 4 ? PyLong_AsUnsignedLongLong(args[3]) : 0;
    if (known_flags == UINT64_MAX && PyErr_Occurred()) return NULL;
    uint64_t max_metadata_nbytes, max_message_nbytes;
    if (!limit_of(args[2], native_str_max_metadata_nbytes, &max_metadata_nbytes) ||
        !limit_of(args[2], native_str_max_message_nbytes, &max_message_nbytes))
        return NULL;
    Py_buffer buffer;
    if (PyObject_GetBuffer(args[0], &buffer, PyBUF_SIMPLE) < 0) return NULL;
    unsigned char header[HEADER_NBYTES];
    int whole = at >= 0 && buffer.len >= HEADER_NBYTES && at <= buffer.len - HEADER_NBYTES;
    if (whole) memcpy(header, (unsigned char *)buffer.buf + at, HEADER_NBYTES);
    PyBuffer_Release(&buffer);
    if (whole) {
        unsigned kind = header[5];
        uint64_t flags = native_read(header + 6, 2);
        uint64_t metadata_nbytes = native_read(header + 16, 4), varying_nbytes = native_read(header + 20, 4);
        uint64_t payload_nbytes = native_read(header + 24, 8);
        if (memcmp(header, "FSPL", 4) == 0 && header[4] == VERSION && kind >= 1 && kind <= LAST_KIND &&
            (flags == 0 || ((flags & ~known_flags) == 0 && kind == REQUEST)) && varying_nbytes <= metadata_nbytes &&
            metadata_nbytes <= max_metadata_nbytes && payload_nbytes <= max_message_nbytes) {
            unsigned long long numbers[7] = {kind,           native_read(header + 8, 8),  metadata_nbytes, varying_nbytes,
                                             payload_nbytes, native_read(header + 32, 8), flags};
            PyObject *found = PyTuple_New(7);
            for (int i = 0; found != NULL && i < 7; i++) {
                PyObject *number = PyLong_FromUnsignedLongLong(numbers[i]);
                if (number == NULL) Py_CLEAR(found);
                else PyTuple_SET_ITEM(found, i, number);
            }
            return found;
        }
    }
    return PyObject_Vectorcall(native_parse_header_reference, args, (size_t)nargs, NULL);
}

/* pack_header(out, kind, request_id, varying_nbytes, payload_nbytes, time_ns=0, flags=0) */
PyObject *native_pack_header(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs) {
    static const int nbytes[6] = {1, 8, 4, 8, 8, 2}; /* of the arguments behind `out` */
    uint64_t numbers[6] = {0, 0, 0, 0, 0, 0};
    int plain = nargs >= 5 && nargs <= 7 && PyByteArray_CheckExact(args[0]) &&
                PyByteArray_GET_SIZE(args[0]) >= HEADER_NBYTES &&
                (uint64_t)PyByteArray_GET_SIZE(args[0]) - HEADER_NBYTES <= UINT32_MAX;
    for (Py_ssize_t i = 1; plain && i < nargs; i++) {
        numbers[i - 1] = PyLong_AsUnsignedLongLong(args[i]);
        if (numbers[i - 1] == UINT64_MAX && PyErr_Occurred()) {
            PyErr_Clear();
            plain = 0;
        } else if (nbytes[i - 1] < 8 && numbers[i - 1] >> 8 * nbytes[i - 1]) {
            plain = 0;
        }
    }
    if (!plain) return PyObject_Vectorcall(native_pack_header_reference, args, (size_t)nargs, NULL);
    unsigned char *out = (unsigned char *)PyByteArray_AS_STRING(args[0]);
    memcpy(out, "FSPL", 4);
    out[4] = VERSION;
    out[5] = (unsigned char)numbers[0];
    native_write(out + 6, numbers[5], 2);
    native_write(out + 8, numbers[1], 8);
    native_write(out + 16, (uint64_t)PyByteArray_GET_SIZE(args[0]) - HEADER_NBYTES, 4);
    native_write(out + 20, numbers[2], 4);
    native_write(out + 24, numbers[3], 8);
    native_write(out + 32, numbers[4], 8);
    Py_RETURN_NONE;
}
