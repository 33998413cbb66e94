/* A call in one step: the request, the wait and the reply, or on the server's side a request and then its reply,
 * between two ends that share memory. What each step does is written in fastsplit/wire/blocking/ and in session.py;
 * read that first.
 *
 * Rules. What is not plain (a new shape, another kind of frame, tensors elsewhere, another thread that sends or reads,
 * anything that is to be refused) is left to Python: then nothing has happened, and a slot that was looked at is still
 * there. Between the last look and the write, and while a frame takes effect, no Python code runs and the interpreter's
 * lock is held: so each of these is one step for other threads and for signals' handlers. (In CPython 3.11 the
 * collector runs where a container is made. Such ones are made before or after.) A slot is copied out, and only the
 * copy is read.
 */

#include "native.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>

enum {
    MAX_RETURNS = 32,
    MAX_DEAD = 64,
    MAX_TENSORS = 64,
    MAX_COPIED_NBYTES = 1 << 18,
    MAX_MISSES = 4,
    RETRY_AFTER = 32,
    MAX_TRIES = 8
};

static const int64_t EARLY_NS = 40000, MAX_SPIN_NS = 10000000;

/* Objects of the connection, by keyword; what each is, fastsplit/wire/fastpath.py says. */
/* clang-format off */
#define PARTS(X)                                                                                                       \
    X(slots) X(templates) X(heads) X(session) X(arena) X(requests) X(returns) X(dead) X(idle) X(is_sending) X(frames)  \
    X(inside) X(greeting) X(copy_in) X(stats) X(link) X(spin) X(result_type) X(future_type) X(call_type) X(handlers)
#define NAMES(X)                                                                                                       \
    X(_map) X(_own) X(_peers) X(_part) X(slot) X(has_pending) X(refusing) X(closed) X(may_request) X(next_id)          \
    X(max_inflight) X(calls) X(core) X(reading) X(watching) X(lock) X(watcher) X(followers) X(callbacks) X(turns)      \
    X(events) X(left_fast_path) X(sort_out) X(acquire) X(release) X(popleft) X(append) X(id) X(nbytes) X(blocks)       \
    X(starts) X(lent) X(returned) X(leases) X(dead) X(code) X(spin_us) X(timeout_s) X(attrs) X(remote_s) X(wait_s)     \
    X(serialization_s) X(bytes_copied) X(tensors) X(op) X(reply_attrs) X(_served) X(_request_id) X(_deadline)          \
    X(_flags) X(_begun) X(_id) X(_done) X(_outcome) X(_callbacks) X(_waited_for) X(_sent_ns)
/* clang-format on */

#define X(name) static PyObject *str_##name;
NAMES(X)
#undef X

typedef struct {
    PyObject_HEAD
#define X(name) PyObject *name;
        PARTS(X)
#undef X
            PyObject *op; /* of the call that is under way; NULL for none */
    int fd, as_torch, may_bring, misses, skipped;
    unsigned long long calls, lent_nbytes, shared_nbytes, copied_nbytes;
    long long serialization_ns, wait_ns, remote_ns;
} FastPath;

/* ---- attributes, by their names above ---- */

/* Whether an attribute is true; -1 with an error. */
static int is_true(PyObject *object, PyObject *name) {
    PyObject *value = PyObject_GetAttr(object, name);
    int truth = value == NULL ? -1 : PyObject_IsTrue(value);
    Py_XDECREF(value);
    return truth;
}

static long long number_of(PyObject *object, PyObject *name) { /* -1, perhaps with an error */
    PyObject *value = PyObject_GetAttr(object, name);
    long long number = value == NULL ? -1 : PyLong_AsLongLong(value);
    Py_XDECREF(value);
    return number;
}

static double real_of(PyObject *object, PyObject *name) { /* -1, perhaps with an error */
    PyObject *value = PyObject_GetAttr(object, name);
    double number = value == NULL ? -1 : PyFloat_AsDouble(value);
    Py_XDECREF(value);
    return number;
}

/* Takes over `value`. 0 with an error. */
static int set(PyObject *object, PyObject *name, PyObject *value) {
    int done = value != NULL && PyObject_SetAttr(object, name, value) == 0;
    Py_XDECREF(value);
    return done;
}

static int add_one(PyObject *object, PyObject *name) {
    return set(object, name, PyLong_FromLongLong(number_of(object, name) + 1));
}

/* An entry of the dict that is an attribute, borrowed: the arena's tables keep it. NULL, perhaps with an error. */
static PyObject *entry_of(PyObject *object, PyObject *name, uint64_t number) {
    PyObject *table = PyObject_GetAttr(object, name), *key = PyLong_FromUnsignedLongLong(number), *found = NULL;
    if (table != NULL && key != NULL) found = PyDict_GetItemWithError(table, key);
    Py_XDECREF(table);
    Py_XDECREF(key);
    return found;
}

/* Index of the last of sorted numbers that is not above `number`; -1 if there is none. */
static Py_ssize_t last_of(PyObject *sorted, uint64_t number) {
    Py_ssize_t low = 0, high = PyList_GET_SIZE(sorted);
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (PyLong_AsUnsignedLongLong(PyList_GET_ITEM(sorted, middle)) <= number) low = middle + 1;
        else high = middle;
    }
    return low - 1;
}

/* The block of ours that holds a place, borrowed, and how far from its start that is; NULL, perhaps with an error. */
static PyObject *block_of(const FastPath *self, uint64_t segment_id, uint64_t offset, uint64_t *within) {
    PyObject *segment = entry_of(self->arena, str__own, segment_id), *block = NULL, *starts;
    if (segment == NULL || (starts = PyObject_GetAttr(segment, str_starts)) == NULL) return NULL;
    Py_ssize_t index = last_of(starts, offset);
    if (index >= 0) {
        uint64_t start = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(starts, index));
        *within = offset - start;
        block = entry_of(segment, str_blocks, start);
    }
    Py_DECREF(starts);
    return block != NULL && *within < (uint64_t)number_of(block, str_nbytes) ? block : NULL;
}

/* ---- out ---- */

/* What goes out. */
typedef struct {
    PyObject *kept; /* a list of copies in shared memory; NULL if there are none */
    uint64_t copied_nbytes;
    Shape shape;
    uint64_t placed[3 * MAX_TENSORS];
} Out;

/* Finds the segment that holds a tensor, and writes its place: 1; 0: it lies elsewhere; -1 with an error. */
static int find_place(const FastPath *self, const Found *found, uint64_t *place) {
    PyObject *map = PyObject_GetAttr(self->arena, str__map);
    if (map == NULL) return -1;
    Py_ssize_t index = last_of(PyTuple_GET_ITEM(map, 0), found->address);
    int known = 0;
    if (index >= 0) {
        uint64_t offset = found->address - PyLong_AsUnsignedLongLong(PyList_GET_ITEM(PyTuple_GET_ITEM(map, 0), index));
        PyObject *segment = PyList_GET_ITEM(PyTuple_GET_ITEM(map, 1), index);
        uint64_t nbytes = (uint64_t)number_of(segment, str_nbytes);
        known = offset <= nbytes && found->nbytes <= nbytes - offset;
        place[0] = (uint64_t)number_of(segment, str_id);
        place[1] = offset;
        place[2] = found->nbytes;
    }
    Py_DECREF(map);
    return PyErr_Occurred() ? -1 : known;
}

/* Copies a small tensor into shared memory. 1, or 0: Python must; -1 with an error. */
static int copy_in(const FastPath *self, PyObject *tensor, Found *found, Out *out) {
    if (found->nbytes > MAX_COPIED_NBYTES) return 0;
    PyObject *copy = PyObject_CallFunction(self->copy_in, "OKK", tensor, (unsigned long long)found->address,
                                           (unsigned long long)found->nbytes);
    Found place;
    int done = copy == NULL ? -1 : copy == Py_None ? 0 : native_find(copy, &place);
    if (done == 1 && ((out->kept == NULL && (out->kept = PyList_New(0)) == NULL) || PyList_Append(out->kept, copy) < 0))
        done = -1;
    if (done == 1) {
        found->address = place.address;
        out->copied_nbytes += found->nbytes;
    }
    Py_XDECREF(copy);
    return done;
}

/* Adds a tensor to what goes out. 1, or 0: Python must look at it; -1 with an error. */
static int add_tensor(const FastPath *self, PyObject *tensor, Out *out) {
    Found found;
    Shape *shape = &out->shape;
    int known = native_find(tensor, &found);
    if (known <= 0) return known;
    if (shape->tensors >= MAX_TENSORS || shape->desc_words + 2 + found.ndim > MAX_DESC_WORDS) return 0;
    uint64_t *place = out->placed + 3 * shape->tensors;
    known = find_place(self, &found, place);
    if (known == 0) {
        known = copy_in(self, tensor, &found, out);
        if (known == 1) known = find_place(self, &found, place);
    }
    if (known <= 0) return known;
    int64_t *desc = shape->desc + shape->desc_words;
    desc[0] = found.code;
    desc[1] = found.ndim;
    memcpy(desc + 2, found.dims, sizeof(int64_t) * (size_t)found.ndim);
    shape->desc_words += 2 + found.ndim;
    shape->tensors++;
    return 1;
}

static int add_tensors(const FastPath *self, PyObject *tensors, Out *out) {
    Py_ssize_t count = native_count(tensors);
    out->kept = NULL;
    out->copied_nbytes = 0;
    out->shape.tensors = out->shape.desc_words = 0;
    if (tensors == Py_None) return 1;
    if (count < 0) return add_tensor(self, tensors, out);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(tensors); i++) {
        int known = add_tensor(self, PySequence_Fast_GET_ITEM(tensors, i), out);
        if (known <= 0) return known;
    }
    return 1;
}

/* Whether a frame can be written now: 1, 0, or -1 with an error. */
static int may_send(const FastPath *self) {
    PyObject *is_sending = PyObject_CallNoArgs(self->is_sending);
    if (is_sending == NULL) return -1;
    Py_DECREF(is_sending);
    if (is_sending != Py_False || PyObject_Size(self->frames) || !native_has_space(self->slots)) return 0;
    int pending = is_true(self->arena, str_has_pending);
    return pending < 0 ? -1 : !pending;
}

/* Writes a frame: 1; 0 if it cannot, and nothing has happened; -1 with an error. The lock is held throughout. */
static int put_frame(FastPath *self, Header *header, PyObject *op, PyObject *attrs, Out *out) {
    Shape *shape = &out->shape;
    const uint64_t *placed = out->placed;
    Py_ssize_t returns = PyObject_Size(self->returns), varying;
    uint64_t returned[2 * MAX_RETURNS];
    PyObject *lent[MAX_TENSORS];
    unsigned char frame[SLOT_NBYTES];
    if (returns > MAX_RETURNS || !native_read_attrs(self->templates, shape, op, attrs, returns)) return 0;
    for (Py_ssize_t i = 0; i < returns; i++) {
        PyObject *each = PySequence_GetItem(self->returns, i);
        if (each == NULL) return -1;
        returned[2 * i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(each, 0));
        returned[2 * i + 1] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(each, 1));
        Py_DECREF(each);
    }
    Py_ssize_t nbytes = native_fill(self->templates, shape, placed, returned, frame, SLOT_NBYTES, &varying);
    if (nbytes < 0) return 0;
    uint64_t lent_nbytes = 0;
    for (int i = 0; i < shape->tensors; i++) {
        lent[i] = NULL;
        lent_nbytes += placed[3 * i + 2];
        if (entry_of(self->arena, str__own, placed[3 * i]) == NULL) continue;
        uint64_t within;
        lent[i] = block_of(self, placed[3 * i], placed[3 * i + 1], &within);
        if (lent[i] == NULL) return PyErr_Occurred() ? -1 : 0;
    }
    if (PyErr_Occurred()) return -1;
    for (int i = 0; i < shape->tensors; i++)
        if (lent[i] != NULL && !add_one(lent[i], str_lent)) return -1;
    for (Py_ssize_t i = 0; i < returns; i++) Py_XDECREF(PyObject_CallMethodNoArgs(self->returns, str_popleft));
    header->metadata_nbytes = (uint64_t)nbytes - HEADER_NBYTES;
    header->varying_nbytes = (uint64_t)varying;
    native_write_header(frame, header);
    int must_wake = native_put_slot(self->slots, frame, nbytes);
    self->calls++;
    self->lent_nbytes += lent_nbytes;
    self->copied_nbytes += out->copied_nbytes;
    if (must_wake) native_ring_bell(self->slots, self->fd);
    return 1;
}

/* ---- in ---- */

/* Waits for a slot, `timeout_ns` at most, below 0 for ever. 1: there is one; 0: Python must look; -1 with an error. */
static int await_slot(FastPath *self, int64_t timeout_ns) {
    if (native_look(self->slots)) return 1;
    double spin_us = real_of(self->spin, str_spin_us);
    double own_s = real_of(self->link, str_timeout_s); /* the socket's own, which saves a system call */
    if (PyErr_Occurred()) return -1;
    int64_t started_ns = native_now_ns(), spin_ns = (int64_t)(spin_us * 1e3);
    /* as Spin of transport/spin.py */
    if (spin_ns > 0 && (self->misses < MAX_MISSES || ++self->skipped >= RETRY_AFTER)) {
        int64_t now_ns = spin_ns < MAX_SPIN_NS ? spin_ns : MAX_SPIN_NS;
        self->skipped = 0;
        if (native_spin(self->slots, timeout_ns < 0 || now_ns < timeout_ns ? now_ns : timeout_ns)) {
            self->misses = 0;
            return 1;
        }
        self->misses += self->misses < MAX_MISSES;
        if (spin_ns > MAX_SPIN_NS) return 0; /* Python looks now and then whether the peer is there */
    }
    for (int tries = 0; tries < MAX_TRIES; tries++) { /* a bell may be an old one */
        int64_t left_ns = timeout_ns < 0 ? -1 : timeout_ns - (native_now_ns() - started_ns);
        if (timeout_ns >= 0 && left_ns < 0) left_ns = 0;
        if (own_s > 0 && own_s <= (double)left_ns * 1e-9) left_ns = -1;
        int woken = native_sleep(self->slots, self->link, self->fd, self->may_bring, spin_ns > 0, left_ns);
        if (woken <= 0 || native_look(self->slots) || (spin_ns > 0 && native_spin(self->slots, EARLY_NS)))
            return woken < 0 ? -1 : native_look(self->slots);
    }
    return 0;
}

/* A frame that came in, before it takes effect. */
typedef struct {
    Header header;
    PyObject *message;               /* a Message */
    PyObject *leases;                /* a tuple of Lease, which are not in force yet */
    PyObject *blocks[MAX_TENSORS];   /* of ours among them, borrowed */
    PyObject *returned[MAX_RETURNS]; /* blocks of ours, borrowed */
    int tensors, returns;
    uint64_t nbytes; /* of all tensors */
} Frame;

static void drop_frame(Frame *frame) {
    Py_CLEAR(frame->leases);
    Py_CLEAR(frame->message);
}

/* A lease on a tensor that the peer sent by reference, not in force; its token is set. NULL, perhaps with an error. */
static Lease *resolve(FastPath *self, Frame *frame, PyObject *desc, PyObject *segment_id, PyObject *at) {
    uint64_t offset = PyLong_AsUnsignedLongLong(at), id = PyLong_AsUnsignedLongLong(segment_id);
    uint64_t nbytes = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(desc, 2));
    if (PyErr_Occurred() || nbytes == 0 || !native_can_view(desc, offset)) return NULL;
    PyObject *segment = entry_of(self->arena, str__peers, id), *block = NULL, *holder = segment;
    if (segment == NULL) {
        if (!PyErr_Occurred()) block = block_of(self, id, offset, &offset);
        if (block == NULL || number_of(block, str_lent) <= number_of(block, str_returned)) return NULL;
        segment = entry_of(self->arena, str__own, id);
        holder = block;
    }
    uint64_t room = (uint64_t)number_of(holder, str_nbytes);
    if (segment == NULL || PyErr_Occurred() || offset > room || nbytes > room - offset) return NULL;
    Lease *lease = native_make_lease(segment, PyLong_AsUnsignedLongLong(at), (Py_ssize_t)nbytes);
    if (lease == NULL) return NULL;
    lease->token = block != NULL ? Py_NewRef(block) : PyTuple_Pack(2, segment_id, at);
    if (lease->token == NULL) Py_CLEAR(lease);
    frame->blocks[frame->tensors++] = block;
    frame->nbytes += nbytes;
    return lease;
}

/* Reads the next slot, which stays there. 1; 0: Python must take it; -1 with an error. */
static int read_frame(FastPath *self, unsigned kind, Frame *frame) {
    unsigned char slot[SLOT_NBYTES];
    memset(frame, 0, sizeof(Frame));
    native_copy_slot(self->slots, slot);
    Header *header = &frame->header;
    if (!native_read_header(slot, header) || header->kind != kind || header->flags || header->payload_nbytes ||
        header->metadata_nbytes > SLOT_NBYTES - HEADER_NBYTES)
        return 0;
    PyObject *message = frame->message = native_decode(
        self->heads, slot + HEADER_NBYTES, (Py_ssize_t)header->metadata_nbytes, (Py_ssize_t)header->varying_nbytes);
    if (message == NULL || message == Py_None) return message == NULL ? -1 : 0;
    PyObject *descs = PyTuple_GET_ITEM(message, 1), *placements = PyTuple_GET_ITEM(message, 4);
    PyObject *returns = PyTuple_GET_ITEM(message, 5);
    Py_ssize_t tensors = PyTuple_GET_SIZE(descs);
    frame->returns = (int)(PyTuple_GET_SIZE(returns) / 2);
    if (PyTuple_GET_SIZE(returns) > 2 * MAX_RETURNS || tensors > MAX_TENSORS ||
        PyTuple_GET_SIZE(placements) != 3 * tensors)
        return 0;
    frame->leases = PyTuple_New(tensors);
    if (frame->leases == NULL) return -1;
    for (Py_ssize_t i = 0; i < tensors; i++) {
        Lease *lease = resolve(self, frame, PyTuple_GET_ITEM(descs, i), PyTuple_GET_ITEM(placements, 3 * i),
                               PyTuple_GET_ITEM(placements, 3 * i + 1));
        if (lease == NULL) return PyErr_Occurred() ? -1 : 0;
        PyTuple_SET_ITEM(frame->leases, i, (PyObject *)lease);
    }
    for (int i = 0; i < frame->returns; i++) {
        uint64_t id = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(returns, 2 * i));
        uint64_t within;
        PyObject *block = block_of(self, id, PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(returns, 2 * i + 1)), &within);
        if (block == NULL) return PyErr_Occurred() ? -1 : 0;
        int earlier = 0; /* of the same block in this very frame */
        for (int j = 0; j < i; j++) earlier += frame->returned[j] == block;
        if (number_of(block, str_lent) - number_of(block, str_returned) <= earlier) return 0;
        frame->returned[i] = block;
    }
    return 1;
}

/* Has a frame that was read take effect. 0 with an error. */
static int take_frame(FastPath *self, Frame *frame) {
    int done = 1, must_wake = native_drop_slot(self->slots);
    for (int i = 0; done && i < frame->tensors; i++) {
        Lease *lease = (Lease *)PyTuple_GET_ITEM(frame->leases, i);
        if (frame->blocks[i] != NULL) done = add_one(frame->blocks[i], str_leases);
        lease->home = Py_NewRef(frame->blocks[i] != NULL ? self->dead : self->returns);
    }
    for (int i = 0; done && i < frame->returns; i++) {
        PyObject *block = frame->returned[i];
        done = add_one(block, str_returned);
        if (done && number_of(block, str_lent) == number_of(block, str_returned) &&
            number_of(block, str_leases) == number_of(block, str_dead)) { /* it is free: the arena's to look at */
            PyObject *noted = PyObject_CallMethodOneArg(self->idle, str_append, block);
            done = noted != NULL;
            Py_XDECREF(noted);
        }
    }
    self->shared_nbytes += frame->nbytes;
    if (must_wake) native_ring_bell(self->slots, self->fd);
    return done;
}

/* A tuple of this type with the frame's tensors. */
static PyObject *views(const FastPath *self, const Frame *frame, PyTypeObject *type) {
    PyObject *tuple = type->tp_alloc(type, frame->tensors);
    for (int i = 0; tuple != NULL && i < frame->tensors; i++) {
        PyObject *view = native_view((Lease *)PyTuple_GET_ITEM(frame->leases, i),
                                     PyTuple_GET_ITEM(PyTuple_GET_ITEM(frame->message, 1), i), self->as_torch);
        if (view == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, view);
    }
    return tuple;
}

/* Has the arena free the blocks whose leases died, if these are many. Runs Python code. 0 with an error. */
static int sort_out(const FastPath *self) {
    if (PyObject_Size(self->dead) <= MAX_DEAD) return 1;
    PyObject *done = PyObject_CallMethodNoArgs(self->arena, str_sort_out);
    Py_XDECREF(done);
    return done != NULL;
}

/* Whether no slot or part of a frame waits for Python: 1, 0, or -1 with an error. */
static int is_plain(const FastPath *self) {
    PyObject *slot = PyObject_GetAttr(self->session, str_slot), *part = PyObject_GetAttr(self->session, str__part);
    int plain = slot == NULL || part == NULL ? -1 : slot == Py_None && part == Py_None;
    Py_XDECREF(slot);
    Py_XDECREF(part);
    return plain;
}

/* Adds what was counted to the connection's Stats, whose numbers go on growing for who holds them. An error that is
 * there stays; what cannot be added is added the next time. */
static void tell(FastPath *self) {
    long long *spent[3] = {&self->serialization_ns, &self->wait_ns, &self->remote_ns};
    PyObject *seconds[3] = {str_serialization_s, str_wait_s, str_remote_s};
    unsigned long long *counted[2] = {&self->calls, &self->copied_nbytes};
    PyObject *counts[2] = {str_calls, str_bytes_copied}, *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (int i = 0; i < 3; i++) {
        if (*spent[i] == 0) continue;
        double total_s = real_of(self->stats, seconds[i]) + (double)*spent[i] * 1e-9;
        if (!PyErr_Occurred() && set(self->stats, seconds[i], PyFloat_FromDouble(total_s))) *spent[i] = 0;
    }
    for (int i = 0; i < 2; i++) {
        if (*counted[i] == 0) continue;
        long long total = number_of(self->stats, counts[i]) + (long long)*counted[i];
        if (!PyErr_Occurred() && set(self->stats, counts[i], PyLong_FromLongLong(total))) *counted[i] = 0;
    }
    PyErr_Clear();
    PyErr_Restore(type, value, trace);
}

/* ---- a client's calls ---- */

typedef struct {
    PyObject *reader, *core, *ident, *id, *op, *attrs, *timeout, *expected;
    int64_t started_ns, sent_ns, timeout_ns; /* below 0: no deadline */
    Out out;
} Request;

static void drop_request(Request *request) {
    Py_CLEAR(request->id);
    Py_CLEAR(request->out.kept);
    Py_CLEAR(request->core);
    Py_CLEAR(request->ident);
}

/* Nanoseconds of a timeout in seconds; below 0 for None and for what is as good as for ever. */
static int64_t timeout_of(PyObject *timeout) { /* -1, perhaps with an error */
    double timeout_s = timeout == Py_None ? -1 : PyFloat_AsDouble(timeout);
    return timeout_s < 0 || timeout_s > 1e9 ? -1 : (int64_t)(timeout_s * 1e9);
}

static int identify(Request *request, PyObject *reader) {
    request->reader = reader;
    request->ident = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    request->core = PyObject_GetAttr(reader, str_core);
    return request->ident != NULL && request->core != NULL;
}

/* The arguments of `call` and `submit`: reader, op, tensors, attrs, timeout_s, expected. 1, 0, or -1 with an error. */
static int begin(FastPath *self, Request *request, PyObject *const *args, Py_ssize_t nargs) {
    memset(request, 0, offsetof(Request, out.copied_nbytes));
    if (nargs != 6) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, expected 6", nargs);
        return -1;
    }
    request->op = args[1], request->attrs = args[3], request->timeout = args[4], request->expected = args[5];
    request->started_ns = native_now_ns();
    request->timeout_ns = timeout_of(request->timeout);
    if (PyErr_Occurred()) return -1;
    if (request->timeout_ns == 0) return 0;
    int known = sort_out(self) ? add_tensors(self, args[2], &request->out) : -1;
    return known == 1 && !identify(request, args[0]) ? -1 : known;
}

/* Whether this thread is in the middle of a call or serves its connection: then its calls are an error of Python's. */
static int is_inside(const FastPath *self, const Request *request) {
    return PySet_Contains(self->inside, request->ident) || PySet_Contains(self->greeting, request->ident);
}

/* Whether a request may be sent now, without waiting for a turn: 1, 0, or -1 with an error. */
static int may_request(const FastPath *self, const Request *request) {
    if (is_inside(self, request) || is_true(request->reader, str_turns) || is_true(request->core, str_refusing) ||
        is_true(self->session, str_may_request) != 1 ||
        PyDict_GET_SIZE(self->requests) >= number_of(request->core, str_max_inflight))
        return PyErr_Occurred() ? -1 : 0;
    return may_send(self);
}

/* Sends a request. `future`: of `submit`, NULL of `call`. 1; 0: nothing has happened; -1 with an error. */
static int send_request(FastPath *self, Request *request, PyObject *future) {
    Header header = {KIND_REQUEST, 0, 0, 0, 0, 0, request->timeout_ns > 0 ? (uint64_t)request->timeout_ns : 0};
    PyObject *id = request->id = PyObject_GetAttr(self->session, str_next_id), *calls = NULL;
    header.request_id = id == NULL ? 0 : PyLong_AsUnsignedLongLong(id);
    if (future != NULL) {
        calls = PyObject_GetAttr(request->core, str_calls);
        if (calls == NULL || PyObject_SetAttr(future, str__id, id) < 0 || PyDict_SetItem(calls, id, future) < 0) {
            Py_XDECREF(calls);
            return -1;
        }
    }
    int sent = PyErr_Occurred() || PyDict_SetItem(self->requests, id, request->expected) < 0 ? -1 : 1;
    if (sent == 1) sent = put_frame(self, &header, request->op, request->attrs, &request->out);
    if (sent == 1 && !set(self->session, str_next_id, PyLong_FromUnsignedLongLong(header.request_id + 1))) sent = -1;
    if (sent <= 0) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        if (id != NULL && (PyDict_DelItem(self->requests, id) < 0 || (calls != NULL && PyDict_DelItem(calls, id) < 0)))
            PyErr_Clear(); /* it was never there */
        PyErr_Restore(type, value, trace);
    }
    Py_XDECREF(calls);
    request->sent_ns = native_now_ns();
    self->serialization_ns += request->sent_ns - request->started_ns;
    return sent;
}

static PyObject *make_future(FastPath *self, const Request *request) {
    PyObject *deadline = request->timeout_ns < 0
                             ? Py_NewRef(Py_None)
                             : PyFloat_FromDouble((double)(request->started_ns + request->timeout_ns) * 1e-9);
    PyObject *sent = PyLong_FromLongLong(request->sent_ns ? request->sent_ns : native_now_ns()), *future = NULL;
    if (deadline != NULL && sent != NULL) {
        PyObject *id = request->id == NULL ? Py_None : request->id;
        PyObject *args[6] = {request->reader, id, request->op, deadline, request->timeout, sent};
        future = PyObject_Vectorcall(self->future_type, args, 6, NULL);
    }
    if (future != NULL && PyObject_SetAttr(future, str__begun, Py_True) < 0) Py_CLEAR(future);
    Py_XDECREF(deadline);
    Py_XDECREF(sent);
    return future;
}

/* Takes the channel's lock. 1, 0 if another thread has it, or -1 with an error. */
static int lock(PyObject *reader) {
    PyObject *rlock = PyObject_GetAttr(reader, str_lock);
    PyObject *held = rlock == NULL ? NULL : PyObject_CallMethodOneArg(rlock, str_acquire, Py_False);
    Py_XDECREF(rlock);
    Py_XDECREF(held);
    return held == NULL ? -1 : held == Py_True;
}

/* An error that is there stays. */
static void unlock(PyObject *reader) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *rlock = PyObject_GetAttr(reader, str_lock);
    Py_XDECREF(rlock == NULL ? NULL : PyObject_CallMethodNoArgs(rlock, str_release));
    Py_XDECREF(rlock);
    PyErr_Restore(type, value, trace);
}

/* Takes the channel's lock, and looks whether this thread may be the one that reads. The collector may run where the
 * lock is taken, but not after it. 1: the lock is held; 0; or -1 with an error. */
static int may_read(const FastPath *self, const Request *request) {
    PyObject *reader = request->reader;
    int held = lock(reader);
    if (held <= 0) return held;
    int plain = is_plain(self);
    if (plain == 1 && (is_inside(self, request) || is_true(reader, str_events) || is_true(reader, str_watching) ||
                       number_of(reader, str_reading)))
        plain = PyErr_Occurred() ? -1 : 0;
    if (plain <= 0) unlock(reader);
    return plain;
}

static int begin_reading(const FastPath *self, const Request *request) {
    return PyObject_SetAttr(request->reader, str_reading, request->ident) == 0 &&
           PySet_Add(self->inside, request->ident) == 0;
}

static int stop_reading(const FastPath *self, const Request *request) {
    return set(request->reader, str_reading, PyLong_FromLong(0)) && PySet_Discard(self->inside, request->ident) >= 0;
}

/* This thread no longer reads. `future`: of its call, which goes on, or NULL. 0 with an error; one that was there
 * stays. */
static int end_reading(FastPath *self, const Request *request, PyObject *future) {
    PyObject *type, *value, *trace, *reader = request->reader;
    int is_call = self->op != NULL; /* after `wait` its caller leaves the rest to the watcher */
    PyErr_Fetch(&type, &value, &trace);
    self->op = NULL;
    /* without the lock, a thread that has just seen this one read may be about to wait for it */
    int held = stop_reading(self, request) ? lock(reader) : -1;
    int more =
        held <= 0 || number_of(reader, str_followers) || is_true(request->core, str_closed) ||
        is_true(reader, str_callbacks) || is_true(reader, str_turns) ||
        (is_call && is_true(reader, str_watcher) && (PyDict_GET_SIZE(self->requests) || is_true(reader, str_events)));
    if (held == 1) unlock(reader);
    if (more) {
        PyErr_Clear();
        Py_XDECREF(PyObject_CallMethodOneArg(reader, str_left_fast_path, future == NULL ? Py_None : future));
    }
    if (type != NULL) {
        PyErr_Clear();
        PyErr_Restore(type, value, trace);
    }
    return !PyErr_Occurred();
}

static int is_expected(PyObject *expected, PyObject *descs) {
    if (expected == Py_None) return 1;
    int as = native_count(expected) == PyTuple_GET_SIZE(descs);
    for (Py_ssize_t i = 0; as && i < PyTuple_GET_SIZE(descs); i++) {
        PyObject *pair = PySequence_Fast_GET_ITEM(expected, i), *desc = PyTuple_GET_ITEM(descs, i);
        as = number_of(PyTuple_GET_ITEM(desc, 0), str_code) == PyLong_AsLongLong(PyTuple_GET_ITEM(pair, 0)) &&
             PyObject_RichCompareBool(PyTuple_GET_ITEM(desc, 1), PyTuple_GET_ITEM(pair, 1), Py_EQ) == 1;
    }
    return as;
}

/* Waits for a slot, and reads it. 1: it is the plain reply to this request; 0: Python must look; -1 with an error,
 * which a signal's handler may have raised. */
static int await_reply(FastPath *self, const Request *request, int64_t timeout_ns, Frame *frame, int64_t *came_ns) {
    frame->message = frame->leases = NULL;
    int came = await_slot(self, timeout_ns);
    *came_ns = native_now_ns();
    if (came == 1) came = read_frame(self, KIND_REPLY, frame);
    if (came == 0 && PyErr_CheckSignals() < 0) came = -1;
    if (came <= 0) return came;
    PyObject *expected = PyDict_GetItemWithError(self->requests, request->id);
    if (expected == NULL || frame->header.request_id != PyLong_AsUnsignedLongLong(request->id) ||
        !is_expected(expected, PyTuple_GET_ITEM(frame->message, 1)))
        return PyErr_Occurred() ? -1 : 0;
    return 1;
}

/* The Result of a reply that was read, which has no effect yet: its leases are not in force. */
static PyObject *make_result(const FastPath *self, const Frame *frame, int64_t waited_ns, int64_t remote_ns) {
    PyObject *result = views(self, frame, (PyTypeObject *)self->result_type);
    if (result != NULL && !(set(result, str_attrs, Py_NewRef(PyTuple_GET_ITEM(frame->message, 2))) &&
                            set(result, str_remote_s, PyFloat_FromDouble((double)remote_ns * 1e-9)) &&
                            set(result, str_wait_s, PyFloat_FromDouble((double)waited_ns * 1e-9))))
        Py_CLEAR(result);
    return result;
}

/* Has a reply take effect: in one step with what the caller notes of it. 0 with an error. */
static int take_reply(FastPath *self, const Request *request, Frame *frame, int64_t remote_ns) {
    self->remote_ns += remote_ns;
    return PyDict_DelItem(self->requests, request->id) == 0 && take_frame(self, frame);
}

/* Nanoseconds in the handler, as the peer says, but no more than this side waited. */
static int64_t remote_of(const Frame *frame, int64_t waited_ns) {
    return frame->header.time_ns < (uint64_t)waited_ns ? (int64_t)frame->header.time_ns : waited_ns;
}

/* call(reader, op, tensors, attrs, timeout_s, expected): a Result; a Future, if Python must wait for it; None: nothing
 * was sent */
static PyObject *FastPath_call(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    Request request;
    Frame frame;
    PyObject *result = NULL, *future = NULL, *calls, *type = NULL, *value, *trace;
    int64_t came_ns;
    int going = begin(self, &request, args, nargs);
    if (going == 1) going = may_read(self, &request);
    if (going == 1) {
        going = may_request(self, &request);
        if (going == 1 && !begin_reading(self, &request)) going = -1;
        if (going == 1) going = send_request(self, &request, NULL);
        self->op = going == 1 ? request.op : NULL;
        if (going <= 0 && !stop_reading(self, &request)) going = -1;
        unlock(request.reader);
    }
    if (going == 1) {
        going = await_reply(self, &request, request.timeout_ns, &frame, &came_ns);
        int64_t waited_ns = came_ns - request.sent_ns;
        self->wait_ns += waited_ns;
        if (going == 1) {
            result = make_result(self, &frame, waited_ns, remote_of(&frame, waited_ns));
            if (result != NULL && !take_reply(self, &request, &frame, remote_of(&frame, waited_ns))) Py_CLEAR(result);
        }
        PyErr_Fetch(&type, &value, &trace);
        if (result == NULL) { /* for Python to wait for, or to cancel */
            future = make_future(self, &request);
            calls = future == NULL ? NULL : PyObject_GetAttr(request.core, str_calls);
            if (calls == NULL || PyDict_SetItem(calls, request.id, future) < 0) Py_CLEAR(future);
            Py_XDECREF(calls);
        }
        drop_frame(&frame);
        self->serialization_ns += native_now_ns() - came_ns;
        end_reading(self, &request, future);
        if (type == NULL) PyErr_Fetch(&type, &value, &trace);
        if (type != NULL) {
            PyErr_Clear();
            Py_CLEAR(result);
            if (future != NULL) Py_XDECREF(PyObject_CallMethod(future, "cancel", NULL));
            Py_CLEAR(future);
            PyErr_Clear();
            PyErr_Restore(type, value, trace);
        }
    } else if (going == 0) {
        result = Py_NewRef(Py_None);
    }
    drop_request(&request);
    tell(self);
    return result != NULL ? result : future;
}

/* submit(reader, op, tensors, attrs, timeout_s, expected): a Future; None: nothing was sent */
static PyObject *FastPath_submit(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    Request request;
    PyObject *future = NULL;
    int going = begin(self, &request, args, nargs);
    if (going == 1 && (future = make_future(self, &request)) == NULL) going = -1;
    if (going == 1) going = may_request(self, &request);
    if (going == 1) going = send_request(self, &request, future);
    if (going < 1) Py_CLEAR(future);
    if (going == 0) future = Py_NewRef(Py_None);
    drop_request(&request);
    tell(self);
    return future;
}

/* Gives a future its result, with all that follows from the reply, if it still waits for that. 0 with an error. */
static int settle(FastPath *self, const Request *request, PyObject *calls, PyObject *future, Frame *frame,
                  PyObject *result, int64_t remote_ns) {
    int held = lock(request->reader), done = held >= 0;
    if (held == 1) {
        if (PyDict_GetItem(calls, request->id) == future && !is_true(future, str__callbacks) &&
            !is_true(future, str__waited_for))
            done = take_reply(self, request, frame, remote_ns) && set(future, str__outcome, Py_NewRef(result)) &&
                   set(future, str__done, Py_NewRef(Py_True)) && PyDict_DelItem(calls, request->id) == 0;
        unlock(request->reader);
    }
    return done;
}

/* wait(reader, future, timeout_s): waits for a reply; where Python must wait, the future is not done afterwards */
static PyObject *FastPath_wait(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "wait: %zd arguments, expected 3", nargs);
    Request request;
    Frame frame;
    PyObject *future = args[1], *calls = NULL, *result = NULL;
    int64_t came_ns, timeout_ns = timeout_of(args[2]);
    memset(&request, 0, offsetof(Request, out.copied_nbytes));
    int going = PyErr_Occurred() || !sort_out(self) || !identify(&request, args[0]) ? -1 : 1;
    if (going == 1 && ((request.id = PyObject_GetAttr(future, str__id)) == NULL ||
                       (calls = PyObject_GetAttr(request.core, str_calls)) == NULL))
        going = -1;
    if (going == 1) going = may_read(self, &request);
    if (going == 1) {
        going = PyDict_GetItem(calls, request.id) == future; /* else it is done */
        if (going == 1 && !begin_reading(self, &request)) {
            stop_reading(self, &request);
            going = -1;
        }
        unlock(request.reader);
    }
    if (going == 1) {
        going = await_reply(self, &request, timeout_ns, &frame, &came_ns);
        if (going == 1) {
            int64_t waited_ns = came_ns - number_of(future, str__sent_ns), remote_ns = remote_of(&frame, waited_ns);
            result = make_result(self, &frame, waited_ns, remote_ns);
            if (result == NULL || !settle(self, &request, calls, future, &frame, result, remote_ns)) going = -1;
        }
        drop_frame(&frame);
        Py_XDECREF(result);
        int64_t taken_ns = native_now_ns() - came_ns; /* the caller counts all of it as waiting */
        self->serialization_ns += taken_ns;
        self->wait_ns -= taken_ns;
        if (!end_reading(self, &request, NULL)) going = -1;
    }
    Py_XDECREF(calls);
    drop_request(&request);
    tell(self);
    return going < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- a server's ---- */

/* receive(served): the Call of the next request; None: Python must look */
static PyObject *FastPath_receive(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 1) return PyErr_Format(PyExc_TypeError, "receive: %zd arguments, expected 1", nargs);
    Frame frame = {.message = NULL};
    int came = !sort_out(self) ? -1 : is_plain(self);
    if (came == 1) came = await_slot(self, -1);
    if (came == 1) came = read_frame(self, KIND_REQUEST, &frame);
    if (came == 1) came = PyDict_Contains(self->handlers, PyTuple_GET_ITEM(frame.message, 0));
    if (came <= 0) {
        drop_frame(&frame);
        return came < 0 ? NULL : Py_NewRef(Py_None);
    }
    PyTypeObject *type = (PyTypeObject *)self->call_type;
    PyObject *attrs = PyTuple_GET_ITEM(frame.message, 2), *call = NULL;
    if (take_frame(self, &frame)) call = type->tp_alloc(type, 0);
    double deadline = (double)native_now_ns() * 1e-9 + (double)frame.header.time_ns * 1e-9;
    if (call != NULL &&
        !(set(call, str_op, Py_NewRef(PyTuple_GET_ITEM(frame.message, 0))) &&
          set(call, str_tensors, views(self, &frame, &PyTuple_Type)) &&
          set(call, str_attrs, PyDict_GET_SIZE(attrs) ? Py_NewRef(attrs) : PyDict_New()) &&
          set(call, str_reply_attrs, PyDict_New()) && set(call, str__served, Py_NewRef(args[0])) &&
          set(call, str__request_id, PyLong_FromUnsignedLongLong(frame.header.request_id)) &&
          set(call, str__deadline, frame.header.time_ns ? PyFloat_FromDouble(deadline) : Py_NewRef(Py_None)) &&
          set(call, str__flags, PyLong_FromLong(0))))
        Py_CLEAR(call);
    drop_frame(&frame);
    return call;
}

/* reply(call, result, time_ns): whether the reply is sent; if not, nothing has happened but that the call's own tensors
 * were released */
static PyObject *FastPath_reply(FastPath *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "reply: %zd arguments, expected 3", nargs);
    Out out;
    out.kept = NULL;
    PyObject *id = PyObject_GetAttr(args[0], str__request_id), *op = PyUnicode_New(0, 0);
    PyObject *attrs = id == NULL ? NULL : PyObject_GetAttr(args[0], str_reply_attrs);
    Header header = {KIND_REPLY, 0, attrs == NULL ? 0 : PyLong_AsUnsignedLongLong(id), 0, 0, 0, 0};
    if (!PyErr_Occurred()) header.time_ns = PyLong_AsUnsignedLongLong(args[2]);
    int done = PyErr_Occurred() || !set(args[0], str_tensors, PyTuple_New(0)) ? -1 : 1;
    PyObject *result =
        PyList_CheckExact(args[1]) ? PySequence_Tuple(args[1]) : Py_NewRef(args[1]); /* a list may change */
    if (result == NULL) done = -1;
    if (done == 1) done = add_tensors(self, result, &out);
    if (done == 1) done = may_send(self);
    if (done == 1) done = put_frame(self, &header, op, attrs, &out);
    Py_XDECREF(result);
    Py_XDECREF(id);
    Py_XDECREF(attrs);
    Py_XDECREF(op);
    Py_XDECREF(out.kept);
    tell(self);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

/* take_counts(): bytes lent, and bytes that came by reference, since the last time */
static PyObject *FastPath_take_counts(FastPath *self, PyObject *Py_UNUSED(ignored)) {
    PyObject *counts = Py_BuildValue("(KK)", self->lent_nbytes, self->shared_nbytes);
    self->lent_nbytes = self->shared_nbytes = 0;
    return counts;
}

/* ---- the object ---- */

int native_init_fastpath(void) {
    int known = 1;
#define X(name) known = known && native_intern(&str_##name, #name);
    NAMES(X)
#undef X
    return known;
}

static PyObject *FastPath_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    FastPath *self = kwargs == NULL || PyTuple_GET_SIZE(args) ? NULL : (FastPath *)type->tp_alloc(type, 0);
    if (self == NULL) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "FastPath: expected keywords");
#define X(name)                                                                                                        \
    if ((self->name = Py_XNewRef(PyDict_GetItemString(kwargs, #name))) == NULL) {                                      \
        PyErr_SetString(PyExc_TypeError, "FastPath: expected " #name);                                                 \
        Py_DECREF(self);                                                                                               \
        return NULL;                                                                                                   \
    }
    PARTS(X)
#undef X
    PyObject *fd = PyDict_GetItemString(kwargs, "fd");
    self->fd = fd == NULL ? -1 : (int)PyLong_AsLong(fd);
    self->as_torch = PyDict_GetItemString(kwargs, "as_torch") == Py_True;
    self->may_bring = PyDict_GetItemString(kwargs, "passes_descriptors") == Py_True;
    if (PyErr_Occurred()) Py_CLEAR(self);
    return (PyObject *)self;
}

static int FastPath_traverse(FastPath *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
#define X(name) Py_VISIT(self->name);
    PARTS(X)
#undef X
    return 0;
}

static int FastPath_clear(FastPath *self) {
#define X(name) Py_CLEAR(self->name);
    PARTS(X)
#undef X
    return 0;
}

static void FastPath_dealloc(FastPath *self) {
    PyObject_GC_UnTrack(self);
    FastPath_clear(self);
    native_free(self);
}

static PyMethodDef FastPath_methods[] = {
    {"call", (PyCFunction)(void (*)(void))FastPath_call, METH_FASTCALL, NULL},
    {"submit", (PyCFunction)(void (*)(void))FastPath_submit, METH_FASTCALL, NULL},
    {"wait", (PyCFunction)(void (*)(void))FastPath_wait, METH_FASTCALL, NULL},
    {"receive", (PyCFunction)(void (*)(void))FastPath_receive, METH_FASTCALL, NULL},
    {"reply", (PyCFunction)(void (*)(void))FastPath_reply, METH_FASTCALL, NULL},
    {"take_counts", (PyCFunction)FastPath_take_counts, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef FastPath_members[] = {
    {"op", T_OBJECT, offsetof(FastPath, op), READONLY, NULL},
    {"link", T_OBJECT, offsetof(FastPath, link), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot FastPath_slots[] = {
    {Py_tp_doc, "Calls in one step; see fastsplit.wire.fastpath."},
    {Py_tp_new, FastPath_new},
    {Py_tp_dealloc, FastPath_dealloc},
    {Py_tp_traverse, FastPath_traverse},
    {Py_tp_clear, FastPath_clear},
    {Py_tp_methods, FastPath_methods},
    {Py_tp_members, FastPath_members},
    {0, NULL},
};

PyType_Spec native_fastpath_spec = {
    .name = "fastsplit._native.FastPath",
    .basicsize = sizeof(FastPath),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = FastPath_slots,
};
