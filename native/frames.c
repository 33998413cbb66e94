/* One frame of the fast path: out and in, through a ring or through a socket. The rules are in fastpath.c.
 *
 * Through a socket a frame goes whole, tensors included, in one system call, and comes into the session's own staging
 * memory. `Session.arrived` says at once that it is there: whatever is not done here, Python does from there.
 */

#include "fastpath.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

enum { MAX_COPIED_NBYTES = 1 << 18, MAX_MISSES = 4, RETRY_AFTER = 32, MAX_TRIES = 8 };

static const int64_t EARLY_NS = 40000, MAX_SPIN_NS = 10000000;

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

/* Checks a small tensor that is sent out of its own memory: that this is still there. 1, or 0: Python must; -1 with an
 * error. */
static int take_in(const FastPath *self, PyObject *tensor, const Found *found, Out *out) {
    if (found->nbytes > self->max_nbytes || out->nbytes + found->nbytes > self->max_nbytes) return 0;
    out->nbytes += found->nbytes;
    if (native_owns_memory(tensor)) return 1;
    PyObject *checked = PyObject_CallFunction(self->check_memory, "OKK", tensor, (unsigned long long)found->address,
                                              (unsigned long long)found->nbytes);
    Py_XDECREF(checked);
    return checked == NULL ? -1 : 1;
}

/* Adds a tensor to what goes out. 1, or 0: Python must look at it; -1 with an error. */
static int add_tensor(const FastPath *self, PyObject *tensor, Out *out) {
    Found found;
    Shape *shape = &out->shape;
    int known = native_find(tensor, &found);
    if (known <= 0) return known;
    if (shape->tensors >= MAX_TENSORS || shape->desc_words + 2 + found.ndim > MAX_DESC_WORDS) return 0;
    uint64_t *place = out->placed + 3 * shape->tensors;
    if (!self->is_ring) {
        known = take_in(self, tensor, &found, out);
        place[0] = 0, place[1] = found.address, place[2] = found.nbytes;
    } else if ((known = find_place(self, &found, place)) == 0) {
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

int native_add_tensors(const FastPath *self, PyObject *tensors, Out *out) {
    Py_ssize_t count = native_count(tensors);
    out->kept = NULL;
    out->copied_nbytes = out->nbytes = 0;
    out->shape.tensors = out->shape.desc_words = 0;
    if (tensors == Py_None) return 1;
    if (count < 0) return add_tensor(self, tensors, out);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(tensors); i++) {
        int known = add_tensor(self, PySequence_Fast_GET_ITEM(tensors, i), out);
        if (known <= 0) return known;
    }
    return 1;
}

int native_take_sending(FastPath *self) {
    /* without making a container, where the collector may run */
    PyObject *taken = self->is_ring ? PyObject_CallMethodNoArgs(self->sending, str_locked)
                                    : PyObject_Call(self->acquire_sending, self->at_once, NULL);
    if (taken == NULL) return -1;
    Py_DECREF(taken);
    if (taken == (self->is_ring ? Py_True : Py_False)) return 0;
    int may = !PyObject_Size(self->frames);
    if (may && self->is_ring) {
        int pending = native_has_space(self->slots) ? is_true(self->arena, str_has_pending) : 1;
        may = pending < 0 ? -1 : !pending;
    } else if (may) { /* once it is closed, its number may be another file's */
        double timeout_s = real_of(self->link, str_timeout_s);
        may = PyErr_Occurred() ? -1 : timeout_s >= 0;
    }
    if (may <= 0) native_leave_sending(self);
    return may;
}

void native_leave_sending(const FastPath *self) {
    if (self->is_ring) return;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    Py_XDECREF(PyObject_CallMethodNoArgs(self->sending, str_release));
    PyErr_Restore(type, value, trace);
}

/* Puts a frame into the ring, and lends what is in it. 1; 0; -1 with an error. */
static int put_in_ring(FastPath *self, const unsigned char *frame, Py_ssize_t nbytes, const Out *out,
                       Py_ssize_t returns) {
    uint64_t lent_nbytes = 0;
    PyObject *lent[MAX_TENSORS];
    for (int i = 0; i < out->shape.tensors; i++) {
        const uint64_t *place = out->placed + 3 * i;
        lent[i] = NULL;
        lent_nbytes += place[2];
        if (entry_of(self->arena, str__own, place[0]) == NULL) continue;
        uint64_t within;
        lent[i] = block_of(self, place[0], place[1], &within);
        if (lent[i] == NULL) return PyErr_Occurred() ? -1 : 0;
    }
    if (PyErr_Occurred()) return -1;
    for (int i = 0; i < out->shape.tensors; i++)
        if (lent[i] != NULL && !add_one(lent[i], str_lent)) return -1;
    for (Py_ssize_t i = 0; i < returns; i++) Py_XDECREF(PyObject_CallMethodNoArgs(self->returns, str_popleft));
    int must_wake = native_put_slot(self->slots, frame, nbytes);
    self->lent_nbytes += lent_nbytes;
    if (must_wake) native_ring_bell(self->slots, self->fd);
    return 1;
}

/* Sends a frame through the socket. 1, also if only a part was sent: then `rest` is to be sent; 0; -1 with an error. */
static int put_in_socket(FastPath *self, unsigned char *frame, Py_ssize_t nbytes, const Out *out) {
    struct iovec parts[1 + MAX_TENSORS] = {{frame, (size_t)nbytes}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 1 + (size_t)out->shape.tensors};
    for (int i = 0; i < out->shape.tensors; i++)
        parts[1 + i] = (struct iovec){(void *)(uintptr_t)out->placed[3 * i + 1], out->placed[3 * i + 2]};
    /* with the interpreter's lock, so that no other thread closes the descriptor */
    ssize_t sent = sendmsg(self->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent <= 0) return 0; /* Python says why */
    self->sent_nbytes += (uint64_t)sent;
    self->unlooked_nbytes += (uint64_t)sent;
    size_t left = (size_t)nbytes + out->nbytes - (size_t)sent, skipped = (size_t)sent, at = 0;
    if (left == 0) return 1;
    self->rest = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)left);
    if (self->rest == NULL) {
        shutdown(self->fd, SHUT_RDWR); /* nothing can follow half a frame */
        return -1;
    }
    for (size_t i = 0; i < message.msg_iovlen; i++) {
        size_t from = skipped < parts[i].iov_len ? skipped : parts[i].iov_len;
        memcpy(PyBytes_AS_STRING(self->rest) + at, (char *)parts[i].iov_base + from, parts[i].iov_len - from);
        at += parts[i].iov_len - from;
        skipped -= from;
    }
    return 1;
}

int native_put_frame(FastPath *self, Header *header, PyObject *op, PyObject *attrs, Out *out) {
    Py_ssize_t returns = self->is_ring ? PyObject_Size(self->returns) : 0, varying;
    uint64_t returned[2 * MAX_RETURNS];
    unsigned char frame[SLOT_NBYTES];
    if (returns > MAX_RETURNS || !native_read_attrs(self->templates, &out->shape, op, attrs, returns)) return 0;
    for (Py_ssize_t i = 0; i < returns; i++) {
        PyObject *each = PySequence_GetItem(self->returns, i);
        if (each == NULL) return -1;
        returned[2 * i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(each, 0));
        returned[2 * i + 1] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(each, 1));
        Py_DECREF(each);
    }
    Py_ssize_t nbytes = native_fill(self->templates, &out->shape, self->is_ring ? out->placed : NULL, returned, frame,
                                    SLOT_NBYTES, &varying);
    if (nbytes < 0) return 0;
    header->metadata_nbytes = (uint64_t)nbytes - HEADER_NBYTES;
    header->varying_nbytes = (uint64_t)varying;
    header->payload_nbytes = out->nbytes;
    native_write_header(frame, header);
    self->encoded_ns = native_now_ns();
    int put = self->is_ring ? put_in_ring(self, frame, nbytes, out, returns) : put_in_socket(self, frame, nbytes, out);
    if (put == 1) {
        self->calls++;
        self->copied_nbytes += out->copied_nbytes;
    }
    return put;
}

/* ---- in ---- */

/* Takes note of a read of the socket. 1: there are bytes; 0: none, or the end; -1 with an error. */
static int note_read(FastPath *self, ssize_t received, int error) {
    if (received > 0) {
        self->arrived += received;
        self->received_nbytes += (uint64_t)received;
        self->unlooked_nbytes += (uint64_t)received;
        if (set(self->session, str_arrived, PyLong_FromSsize_t(self->arrived))) return 1;
        shutdown(self->fd, SHUT_RDWR); /* nothing can follow bytes that are lost */
        return -1;
    }
    if (received == 0 || error == EAGAIN || error == EINTR) return 0;
    PyObject *failure = PyObject_CallFunction(PyExc_OSError, "is", error, strerror(error)); /* Python raises it */
    return set(self->link, str_failure, failure) ? 0 : -1;
}

/* Without the interpreter's lock. */
static ssize_t read_socket(const FastPath *self, int flags) {
    return recv(self->fd, (char *)self->into.buf + self->arrived, (size_t)(self->into.len - self->arrived), flags);
}

/* Reads the socket as soon as there are bytes, within `spin_ns`. As `note_read`. */
static int spin_on_socket(FastPath *self, int64_t spin_ns) {
    ssize_t received;
    int error;
    Py_BEGIN_ALLOW_THREADS
    int64_t end_ns = native_now_ns() + spin_ns;
    do {
        received = read_socket(self, MSG_DONTWAIT);
        error = errno;
    } while (received < 0 && error == EAGAIN && native_now_ns() < end_ns);
    Py_END_ALLOW_THREADS
    return note_read(self, received, error);
}

/* Sleeps until there are bytes, `timeout_ns` at most; below 0: as long as the socket's own timeout. As `note_read`. */
static int sleep_on_socket(FastPath *self, int64_t timeout_ns) {
    struct pollfd readable = {self->fd, POLLIN, 0};
    ssize_t received = -1;
    int error = EAGAIN;
    Py_BEGIN_ALLOW_THREADS
    if (timeout_ns < 0 || poll(&readable, 1, native_poll_ms(timeout_ns)) > 0) {
        received = read_socket(self, timeout_ns < 0 ? 0 : MSG_DONTWAIT);
        error = errno;
    }
    Py_END_ALLOW_THREADS
    return note_read(self, received, error);
}

/* Sleeps, through false alarms of a ring's bell. 1: there is a frame, or a part of one; 0: Python must look; -1 with an
 * error. */
static int sleep_until(FastPath *self, int64_t end_ns, double own_s, int spins) {
    for (int tries = 0; tries < MAX_TRIES; tries++) {
        int64_t left_ns = end_ns == INT64_MAX ? -1 : end_ns - native_now_ns();
        if (end_ns != INT64_MAX && left_ns < 0) left_ns = 0;
        if (own_s > 0 && own_s <= (double)left_ns * 1e-9) left_ns = -1;
        if (!self->is_ring) return sleep_on_socket(self, left_ns);
        int woken = native_sleep(self->slots, self->link, self->fd, self->may_bring, spins, left_ns);
        if (woken <= 0 || native_look(self->slots) || (spins && native_spin(self->slots, EARLY_NS)))
            return woken < 0 ? -1 : native_look(self->slots);
    }
    return 0;
}

int native_await(FastPath *self, int64_t end_ns) {
    if (self->is_ring && native_look(self->slots)) return 1;
    double spin_us = real_of(self->spin, str_spin_us);
    double own_s = real_of(self->link, str_timeout_s); /* the socket's own, which saves a system call */
    if (PyErr_Occurred()) return -1;
    if (own_s < 0) return 0; /* it is closed */
    int64_t spin_ns = (int64_t)(spin_us * 1e3);
    /* as Spin of transport/spin.py */
    if (spin_ns > 0 && (self->misses < MAX_MISSES || ++self->skipped >= RETRY_AFTER)) {
        int64_t left_ns = end_ns - native_now_ns(), now_ns = spin_ns < MAX_SPIN_NS ? spin_ns : MAX_SPIN_NS;
        if (now_ns > left_ns) now_ns = left_ns;
        self->skipped = 0;
        int found = self->is_ring ? native_spin(self->slots, now_ns) : spin_on_socket(self, now_ns);
        self->misses = found ? 0 : self->misses < MAX_MISSES ? self->misses + 1 : self->misses;
        if (found) return found;
        if (spin_ns > MAX_SPIN_NS) return 0; /* Python looks now and then whether the peer is there */
    }
    if (PyErr_CheckSignals() < 0) return -1; /* of a signal that came before it no system call knows */
    if (real_of(self->link, str_timeout_s) < 0) return PyErr_Occurred() ? -1 : 0; /* its handler has forked */
    return sleep_until(self, end_ns, own_s, spin_ns > 0);
}

int native_has_more(const FastPath *self) {
    char byte;
    return !self->is_ring && recv(self->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0; /* the end is more, too */
}

void native_drop_frame(Frame *frame) {
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

/* Memory of its own for a tensor that came through the socket: a lease that is in force, and nobody's. NULL, perhaps
 * with an error. */
static Lease *copy_out(Frame *frame, PyObject *desc, const unsigned char *payload) {
    uint64_t nbytes = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(desc, 2)); /* all of them are in the payload */
    if (PyErr_Occurred() || nbytes == 0 || !native_can_view(desc, 0)) return NULL;
    Lease *lease = native_make_private((size_t)nbytes);
    if (lease == NULL) return NULL;
    memcpy(lease->address, payload + frame->nbytes, (size_t)nbytes);
    frame->tensors++;
    frame->nbytes += nbytes;
    return lease;
}

int native_read_frame(FastPath *self, unsigned kind, Frame *frame) {
    unsigned char slot[SLOT_NBYTES];
    const unsigned char *in = self->is_ring ? slot : self->into.buf;
    uint64_t nbytes = self->is_ring ? SLOT_NBYTES : (uint64_t)self->arrived, payload_nbytes;
    if (self->is_ring) native_copy_slot(self->slots, slot);
    Header *header = &frame->header;
    if (nbytes < HEADER_NBYTES || !native_read_header(in, header) || header->kind != kind ||
        header->flags & ~(uint64_t)(kind == KIND_REQUEST ? self->known_flags : 0) ||
        header->metadata_nbytes > nbytes - HEADER_NBYTES)
        return 0;
    payload_nbytes = self->is_ring ? 0 : nbytes - HEADER_NBYTES - header->metadata_nbytes; /* that have arrived */
    if (header->payload_nbytes < payload_nbytes ||
        header->payload_nbytes - payload_nbytes > (uint64_t)(self->into.len - self->arrived))
        return 0;
    PyObject *message = frame->message = native_decode(
        self->heads, in + HEADER_NBYTES, (Py_ssize_t)header->metadata_nbytes, (Py_ssize_t)header->varying_nbytes);
    if (message == NULL || message == Py_None) return message == NULL ? -1 : 0;
    PyObject *descs = PyTuple_GET_ITEM(message, 1), *placements = PyTuple_GET_ITEM(message, 4);
    PyObject *returns = PyTuple_GET_ITEM(message, 5);
    Py_ssize_t tensors = PyTuple_GET_SIZE(descs);
    frame->returns = (int)(PyTuple_GET_SIZE(returns) / 2);
    if (PyTuple_GET_SIZE(returns) > (self->is_ring ? 2 * MAX_RETURNS : 0) || tensors > MAX_TENSORS ||
        PyTuple_GET_SIZE(placements) != (self->is_ring ? 3 * tensors : 0) ||
        PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(message, 3)) != header->payload_nbytes)
        return 0;
    if (header->payload_nbytes > payload_nbytes) return PARTLY;
    frame->leases = PyTuple_New(tensors);
    if (frame->leases == NULL) return -1;
    const unsigned char *payload = in + HEADER_NBYTES + header->metadata_nbytes;
    for (Py_ssize_t i = 0; i < tensors; i++) {
        PyObject *desc = PyTuple_GET_ITEM(descs, i);
        Lease *lease = self->is_ring ? resolve(self, frame, desc, PyTuple_GET_ITEM(placements, 3 * i),
                                               PyTuple_GET_ITEM(placements, 3 * i + 1))
                                     : copy_out(frame, desc, payload);
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

int native_take_frame(FastPath *self, Frame *frame) {
    if (!self->is_ring) {
        self->arrived = 0;
        self->staged_nbytes += frame->nbytes;
        return set(self->session, str_arrived, PyLong_FromLong(0));
    }
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

PyObject *native_views(const FastPath *self, const Frame *frame, PyTypeObject *type) {
    PyObject *tuple = type->tp_alloc(type, frame->tensors);
    for (int i = 0; tuple != NULL && i < frame->tensors; i++) {
        PyObject *view = native_view((Lease *)PyTuple_GET_ITEM(frame->leases, i),
                                     PyTuple_GET_ITEM(PyTuple_GET_ITEM(frame->message, 1), i), self->as_torch);
        if (view == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, view);
    }
    return tuple;
}

int native_is_plain(FastPath *self) {
    if (self->is_ring) {
        int plain = is_none(self->session, str_slot);
        return plain == 1 ? is_none(self->session, str__part) : plain;
    }
    self->arrived = 0;
    int plain = is_none(self->session, str__payload);
    if (plain == 1 && (number_of(self->session, str__filled) || number_of(self->session, str_arrived) ||
                       is_true(self->session, str_unfinished) || !is_none(self->link, str_failure)))
        plain = 0;
    return PyErr_Occurred() ? -1 : plain;
}
