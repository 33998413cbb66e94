/* What the fast path's files share: fastpath.c makes calls and serves requests, frames.c sends and receives their
 * frames. The rules are in fastpath.c. */

#ifndef FASTSPLIT_FASTPATH_H
#define FASTSPLIT_FASTPATH_H

#include "native.h"

enum { MAX_RETURNS = 32, MAX_TENSORS = 64, PARTLY = 2 };

/* Objects of the connection, by keyword; what each is, fastsplit/wire/fastpath.py says. */
/* clang-format off */
#define PARTS(X)                                                                                                       \
    X(slots) X(staging) X(templates) X(heads) X(session) X(arena) X(requests) X(returns) X(dead) X(idle) X(sending)    \
    X(acquire_sending) X(at_once) X(frames) X(inside) X(greeting) X(copy_in) X(check_memory) X(stats) X(link) X(spin)  \
    X(result_type) X(future_type) X(call_type) X(handlers) X(send_rest)
#define NAMES(X)                                                                                                       \
    X(_map) X(_own) X(_peers) X(_part) X(_payload) X(_filled) X(slot) X(arrived) X(unfinished) X(failure) X(locked)    \
    X(has_pending) X(refusing) X(closed) X(may_request) X(next_id) X(max_inflight) X(calls) X(core) X(flags)           \
    X(reading) X(watching) X(lock) X(watcher) X(followers) X(callbacks) X(turns) X(events) X(left_fast_path)           \
    X(sort_out) X(acquire) X(release) X(popleft) X(append) X(id) X(nbytes) X(blocks) X(starts) X(lent) X(returned)     \
    X(leases) X(dead) X(code) X(spin_us) X(timeout_s) X(attrs) X(remote_s) X(wait_s) X(serialization_s)                \
    X(bytes_copied) X(tensors) X(op) X(reply_attrs) X(_served) X(_request_id) X(_deadline) X(_flags) X(_begun) X(_id)  \
    X(_done) X(_outcome) X(_callbacks) X(_waited_for) X(_sent_ns)
/* clang-format on */

#define X(name) extern PyObject *str_##name;
NAMES(X)
#undef X

typedef struct {
    PyObject_HEAD
#define X(name) PyObject *name;
        PARTS(X)
#undef X
            PyObject *op; /* of the call that is under way; NULL for none */
    PyObject *rest;       /* bytes: what the socket did not take of a frame; `sending` is held then. NULL for none */
    Py_buffer into;       /* of `staging`, where a socket is read into; of no object beside a ring */
    Py_ssize_t arrived;   /* bytes that are there, as Session.arrived says */
    int is_ring, fd, as_torch, may_bring, misses, skipped;
    unsigned known_flags;                    /* that a request may have */
    uint64_t max_nbytes;                     /* of a tensor and of all tensors that are sent through a socket */
    uint64_t unlooked_nbytes;                /* that went through the socket since Python last sent */
    unsigned long long calls, copied_nbytes; /* which `tell` has yet to add to the Stats */
    unsigned long long lent_nbytes, shared_nbytes, sent_nbytes, received_nbytes, staged_nbytes; /* in all */
    long long serialization_ns, wait_ns, remote_ns;
    int64_t encoded_ns; /* when the last frame was encoded, and was about to be sent */
} FastPath;

/* What goes out. */
typedef struct {
    PyObject *kept; /* a list of copies in shared memory; NULL if there are none */
    uint64_t copied_nbytes;
    Shape shape;
    uint64_t nbytes;                  /* through a socket: of all tensors */
    uint64_t placed[3 * MAX_TENSORS]; /* of each tensor: segment (through a socket its address), offset, nbytes */
} Out;

/* A frame that came in, before it takes effect. */
typedef struct {
    Header header;
    PyObject *message;               /* a Message */
    PyObject *leases;                /* a tuple of Lease; those of shared memory are not in force yet */
    PyObject *blocks[MAX_TENSORS];   /* of ours among them, borrowed */
    PyObject *returned[MAX_RETURNS]; /* blocks of ours, borrowed */
    int tensors, returns;
    uint64_t nbytes; /* of all tensors */
    int64_t came_ns; /* when the wait for it ended */
} Frame;

/* 1, 0: Python must; -1 with an error. */
int native_add_tensors(const FastPath *self, PyObject *tensors, Out *out);
/* Whether a frame can be written now. If so, and if it goes through a socket, `sending` is taken. */
int native_take_sending(FastPath *self);
void native_leave_sending(const FastPath *self); /* an error that is there stays */
/* Writes a frame: 0 if it cannot, and nothing has happened. The interpreter's lock is held throughout. */
int native_put_frame(FastPath *self, Header *header, PyObject *op, PyObject *attrs, Out *out);
/* Whether no slot, bytes or part of a frame wait for Python. */
int native_is_plain(FastPath *self);
/* Waits until `end_ns` for a frame, or for more of one; INT64_MAX: for ever. */
int native_await(FastPath *self, int64_t end_ns);
/* Whether more has come through the socket than was read. */
int native_has_more(const FastPath *self);
/* Reads the next frame, which stays where it is. PARTLY: its header and message, the payload's end is still to come. */
int native_read_frame(FastPath *self, unsigned kind, Frame *frame);
/* Has a frame that was read take effect. 0 with an error. */
int native_take_frame(FastPath *self, Frame *frame);
void native_drop_frame(Frame *frame);
/* A tuple of this type with the frame's tensors. */
PyObject *native_views(const FastPath *self, const Frame *frame, PyTypeObject *type);

/* ---- attributes, by their names above ---- */

/* Whether an attribute is true; -1 with an error. */
static inline int is_true(PyObject *object, PyObject *name) {
    PyObject *value = PyObject_GetAttr(object, name);
    int truth = value == NULL ? -1 : PyObject_IsTrue(value);
    Py_XDECREF(value);
    return truth;
}

/* Whether an attribute is None; -1 with an error. */
static inline int is_none(PyObject *object, PyObject *name) {
    PyObject *value = PyObject_GetAttr(object, name);
    Py_XDECREF(value);
    return value == NULL ? -1 : value == Py_None;
}

static inline long long number_of(PyObject *object, PyObject *name) { /* -1, perhaps with an error */
    PyObject *value = PyObject_GetAttr(object, name);
    long long number = value == NULL ? -1 : PyLong_AsLongLong(value);
    Py_XDECREF(value);
    return number;
}

static inline double real_of(PyObject *object, PyObject *name) { /* -1, perhaps with an error */
    PyObject *value = PyObject_GetAttr(object, name);
    double number = value == NULL ? -1 : PyFloat_AsDouble(value);
    Py_XDECREF(value);
    return number;
}

/* Takes over `value`. 0 with an error. */
static inline int set(PyObject *object, PyObject *name, PyObject *value) {
    int done = value != NULL && PyObject_SetAttr(object, name, value) == 0;
    Py_XDECREF(value);
    return done;
}

static inline int add_one(PyObject *object, PyObject *name) {
    return set(object, name, PyLong_FromLongLong(number_of(object, name) + 1));
}

#endif
