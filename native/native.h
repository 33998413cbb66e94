/* What the files of fastsplit._native share. docs/architecture.md says what is compiled and why. */

#ifndef FASTSPLIT_NATIVE_H
#define FASTSPLIT_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <time.h>

enum { NATIVE_REVISION = 4 }; /* of what Python takes for granted here: see fastsplit/wire/backend.py */

/* Numbers of a message: little-endian, at any address. */
static inline uint64_t native_read(const unsigned char *at, int nbytes) {
    uint64_t number = 0;
    for (int i = 0; i < nbytes; i++) number |= (uint64_t)at[i] << 8 * i;
    return number;
}

static inline void native_write(unsigned char *at, uint64_t number, int nbytes) {
    for (int i = 0; i < nbytes; i++) at[i] = (unsigned char)(number >> 8 * i);
}

static inline int64_t native_now_ns(void) { /* of time.monotonic and time.perf_counter */
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The end of a `tp_dealloc` of a type that was made from a spec. */
static inline void native_free(void *object) {
    PyTypeObject *type = Py_TYPE((PyObject *)object);
    type->tp_free(object);
    Py_DECREF(type);
}

/* Items of an exact list or tuple, whose iteration runs no code; -1: it is neither. */
static inline Py_ssize_t native_count(PyObject *items) {
    return PyList_CheckExact(items) || PyTuple_CheckExact(items) ? PySequence_Fast_GET_SIZE(items) : -1;
}

static inline int native_intern(PyObject **into, const char *text) {
    return (*into = PyUnicode_InternFromString(text)) != NULL;
}

/* ---- tables that are bounded: the oldest entry goes first (templates.c, heads.c) ---- */

enum { NATIVE_BUCKETS = 1024, NATIVE_MAX_ENTRIES = 512 };

typedef struct NativeEntry {
    struct NativeEntry *next; /* in its bucket */
    struct NativeEntry *younger;
    uint64_t hash;
} NativeEntry;

typedef struct {
    int count;
    NativeEntry *oldest, *youngest;
    NativeEntry *buckets[NATIVE_BUCKETS];
} NativeTable;

static inline NativeEntry **native_bucket(NativeTable *table, uint64_t hash) {
    return &table->buckets[hash & (NATIVE_BUCKETS - 1)];
}

static inline NativeEntry *native_take_oldest(NativeTable *table) {
    NativeEntry *oldest = table->oldest;
    if (oldest == NULL) return NULL;
    NativeEntry **link = native_bucket(table, oldest->hash);
    while (*link != oldest) link = &(*link)->next;
    *link = oldest->next;
    table->oldest = oldest->younger;
    if (table->oldest == NULL) table->youngest = NULL;
    table->count--;
    return oldest;
}

/* Adds an entry. Returns the one that had to go for it, the caller's to free; NULL if none. */
static inline NativeEntry *native_add(NativeTable *table, NativeEntry *entry) {
    NativeEntry *gone = table->count >= NATIVE_MAX_ENTRIES ? native_take_oldest(table) : NULL;
    NativeEntry **bucket = native_bucket(table, entry->hash);
    entry->next = *bucket;
    *bucket = entry;
    if (table->youngest != NULL) table->youngest->younger = entry;
    else table->oldest = entry;
    table->youngest = entry;
    table->count++;
    return gone;
}

/* ---- header.c ---- */

enum { HEADER_NBYTES = 40, KIND_REQUEST = 2, KIND_REPLY = 3 };

typedef struct {
    unsigned kind;
    uint64_t flags, request_id, metadata_nbytes, varying_nbytes, payload_nbytes, time_ns;
} Header;

void native_write_header(unsigned char *out, const Header *header);
/* 0: not one of this version, or one that contradicts itself. Limits and flags are the caller's to check. */
int native_read_header(const unsigned char *in, Header *header);

/* ---- templates.c ---- */

enum Kind { FIXED, INT, BOOL, FLOAT }; /* how an attribute travels: in the message's text, or as a number */
enum { MAX_ATTRS = 64, MAX_DESC_WORDS = 512, MAX_PLACED_WORDS = 3 * MAX_DESC_WORDS / 2, MAX_RETURN_WORDS = 128 };

/* What a message to send is: its shape, and its numbers. */
typedef struct {
    PyObject *op; /* borrowed, as all below */
    uint64_t hash;
    int desc_words, tensors, returns, attrs, ints, floats;
    int64_t desc[MAX_DESC_WORDS]; /* of each tensor: dtype code, number of dimensions, dimensions */
    unsigned char kinds[MAX_ATTRS];
    PyObject *names[MAX_ATTRS];
    PyObject *values[MAX_ATTRS]; /* of FIXED ones */
    int64_t int_values[MAX_ATTRS];
    double float_values[MAX_ATTRS];
} Shape;

/* Reads a message's attributes; 0: Python must look at it. `returns`: how many it has. Then `shape` is complete, if its
 * tensors are. Runs no code of a value's. */
int native_read_attrs(PyObject *templates, Shape *shape, PyObject *op, PyObject *attrs, Py_ssize_t returns);
/* Writes headroom and message to `out` of `size` bytes, and how many at its end vary. Returns its bytes; -1 if it is
 * not known, or too long. `placed`: three words for each tensor, NULL if all are inline. `returned`: two for each
 * return. */
Py_ssize_t native_fill(PyObject *templates, const Shape *shape, const uint64_t *placed, const uint64_t *returned,
                       unsigned char *out, Py_ssize_t size, Py_ssize_t *varying);

/* ---- heads.c ---- */

/* The message (a new reference), or None if its head is not known or a number is not one that Python would accept. */
PyObject *native_decode(PyObject *heads, const unsigned char *bytes, Py_ssize_t nbytes, Py_ssize_t varying);

/* ---- tensors.c ---- */

enum { MAX_DIMS = 32 };

typedef struct {
    int code, ndim;
    int64_t dims[MAX_DIMS];
    uint64_t address, nbytes;
} Found;

/* Where a tensor lies: 1; 0: Python must look at it; -1 with an error. Runs code of torch's. */
int native_find(PyObject *tensor, Found *found);

/* Whether an array is known to lie in memory that nothing resizes or closes. */
int native_owns_memory(PyObject *tensor);

/* The right to use a part of shared memory, as Lease of fastsplit/tensors/pool.py: at the death of its last view
 * `token` is appended to `home`, NULL until the lease is in force. Or memory of its own, without these three. A buffer
 * of bytes. */
typedef struct {
    PyObject_HEAD PyObject *segment, *token, *home;
    void *address;
    Py_ssize_t nbytes;
} Lease;
PyObject *native_lease(PyObject *module, PyObject *args);
Lease *native_make_lease(PyObject *segment, uint64_t offset, Py_ssize_t nbytes);
Lease *native_make_private(size_t nbytes); /* aligned to 64 bytes */
int native_knows_torch(void);              /* whether torch is there, with its exchange of tensors; -1 with an error */
/* Whether `native_view` can make a tensor of this description, a TensorDesc, at this offset. */
int native_can_view(PyObject *desc, uint64_t offset);
PyObject *native_view(Lease *lease, PyObject *desc, int as_torch);

/* ---- slots.c ---- */

enum { SLOT_NBYTES = 1024 };

int native_look(PyObject *slots);      /* 1: there is a slot to read; 0: none, or closed */
int native_has_space(PyObject *slots); /* as above */
void native_copy_slot(PyObject *slots, unsigned char *out);
int native_drop_slot(PyObject *slots); /* it was read. 1: the peer sleeps, and must be told that there is space */
int native_put_slot(PyObject *slots, const unsigned char *part, Py_ssize_t nbytes); /* as above; there is space */
void native_ring_bell(PyObject *slots, int fd);
int native_poll_ms(int64_t timeout_ns); /* for poll(2) */
int native_spin(PyObject *slots, int64_t spin_ns);
/* Sleeps on the socket until the peer has done something, `timeout_ns` at most; below 0: as long as the socket's own
 * timeout. 1: it may have; 0: Python must look; -1 with an error. If bells `may_bring` descriptors, those
 * that came along are kept in `link`, a Stream. */
int native_sleep(PyObject *slots, PyObject *link, int fd, int may_bring, int is_eager, int64_t timeout_ns);

/* Made when the module is imported, and never changed. */
extern PyObject *native_PeerLostError; /* fastsplit.errors.PeerLostError */
extern PyObject *native_str_slot;

int native_init_tensors(void), native_init_fastpath(void); /* 0 with an error */

extern PyType_Spec native_slots_spec, native_templates_spec, native_heads_spec, native_lease_spec, native_fastpath_spec;

#endif
