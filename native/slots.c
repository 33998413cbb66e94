/* The slots of a ring in shared memory: what fastsplit/wire/shm/slots.py does, step for step; read that first.
 *
 * Rules. Nothing in shared memory is trusted: no index, no length and no pointer is read from it; a slot is copied out
 * in one memcpy. Semaphores are libc's spin locks, as in Python, so that both work on one ring: locked means taken. The
 * interpreter's lock is held in every method but `poll`, which lets it go while it looks, and touches nothing but the
 * semaphore then; if `close` comes meanwhile, the memory is let go when the last `poll` ends.
 */

#include "native.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <structmember.h>
#include <sys/socket.h>

enum {
    SLOTS = 64,
    HALF = SLOTS / 2,
    STRIDE = 64, /* bytes from one semaphore to the next */
    ASLEEP_AT = 64,
    FENCE_AT = 192,
    SPACE_AT = 256,
    SPACE_STEP = 128, /* from one direction's to the other's */
    ITEMS_AT = 4096,
    ITEMS_STEP = 4096,
    SLOTS_AT = 12288,
    RING_NBYTES = SLOTS_AT + 2 * SLOTS * SLOT_NBYTES,
    UNRUNG = 3,
    AWAKE = 0,
    ASLEEP = 1,
    EAGER = 2,
    MAX_TRIES = 1000,
    LOOKS = 32, /* between two looks at the clock */
};

typedef struct {
    PyObject_HEAD Py_buffer memory;
    unsigned char *base; /* NULL once it is closed */
    int mine, theirs;    /* directions: 0 is the client's */
    int out_slot, in_slot;
    int credit; /* slots that may be written */
    int taken;  /* whether the next slot may be read */
    int polls;  /* calls of `poll` that are looking now, without the interpreter's lock */
    int owed;   /* the half (1 or 2) that was read and is to be given to the peer, UNRUNG if it was; 0 for none */
    Py_ssize_t rung, heard; /* bells, as bytes through the socket, of `native_ring_bell` and `native_sleep` */
} Slots;

static inline pthread_spinlock_t *lock_at(const Slots *self, size_t at) {
    return (pthread_spinlock_t *)(self->base + at);
}

static inline pthread_spinlock_t *item(const Slots *self, int direction, int slot) {
    return lock_at(self, ITEMS_AT + (size_t)direction * ITEMS_STEP + (size_t)slot * STRIDE);
}

static inline pthread_spinlock_t *space(const Slots *self, int direction, int half) {
    return lock_at(self, SPACE_AT + (size_t)direction * SPACE_STEP + (size_t)half * STRIDE);
}

static inline unsigned char *slot_at(const Slots *self, int direction, int slot) {
    return self->base + SLOTS_AT + ((size_t)direction * SLOTS + (size_t)slot) * SLOT_NBYTES;
}

static inline _Atomic unsigned char *asleep(const Slots *self, int direction) {
    return (_Atomic unsigned char *)(self->base + ASLEEP_AT + (size_t)direction * STRIDE);
}

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static int is_open(const Slots *self) {
    if (self->base != NULL) return 1;
    PyErr_SetString(native_PeerLostError, "the connection is closed");
    return 0;
}

/* Orders what this side wrote before what it reads next. Where a Python peer orders by the shared fence, so must this
 * side: 0 if it could not get it. */
static int pass_fence(Slots *self) {
    atomic_thread_fence(memory_order_seq_cst);
#if !defined(__x86_64__) && !defined(__i386__)
    pthread_spinlock_t *fence = lock_at(self, FENCE_AT);
    for (int tries = 0; tries < MAX_TRIES; tries++) {
        if (pthread_spin_trylock(fence) == 0) {
            pthread_spin_unlock(fence);
            return 1;
        }
    }
    return 0;
#else
    (void)self;
    return 1;
#endif
}

static int Slots_init(Slots *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"memory", "is_client", NULL};
    PyObject *memory;
    int is_client;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O$p", names, &memory, &is_client)) return -1;
    if (self->base != NULL) {
        PyErr_SetString(PyExc_TypeError, "Slots cannot be initialized twice");
        return -1;
    }
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE) < 0) return -1;
    if (self->memory.len != RING_NBYTES) {
        PyErr_Format(PyExc_ValueError, "memory: %zd bytes, expected %d", self->memory.len, RING_NBYTES);
        PyBuffer_Release(&self->memory);
        return -1;
    }
    self->base = self->memory.buf;
    self->mine = is_client ? 0 : 1;
    self->theirs = 1 - self->mine;
    self->out_slot = self->in_slot = self->taken = self->owed = 0;
    self->credit = SLOTS;
    return 0;
}

static void let_go(Slots *self) {
    if (self->base == NULL && self->polls == 0) PyBuffer_Release(&self->memory); /* does nothing the second time */
}

static PyObject *Slots_close(Slots *self, PyObject *Py_UNUSED(ignored)) {
    self->base = NULL;
    self->credit = self->taken = self->owed = 0;
    let_go(self);
    Py_RETURN_NONE;
}

static PyObject *Slots_leave(Slots *self, PyObject *Py_UNUSED(ignored)) {
    self->polls = 0; /* the threads that polled are the parent's */
    return Slots_close(self, NULL);
}

static void Slots_dealloc(Slots *self) {
    PyBuffer_Release(&self->memory);
    native_free(self);
}

/* ---- out ---- */

static int find_space(Slots *self) {
    if (self->credit > 0) return 1;
    if (pthread_spin_trylock(space(self, self->mine, self->out_slot / HALF)) != 0) return 0;
    self->credit += HALF;
    return 1;
}

static PyObject *Slots_has_space(Slots *self, PyObject *Py_UNUSED(ignored)) {
    if (!is_open(self)) return NULL;
    return PyBool_FromLong(find_space(self));
}

static void put_slot(Slots *self, const unsigned char *part, Py_ssize_t nbytes) {
    memcpy(slot_at(self, self->mine, self->out_slot), part, (size_t)nbytes);
    pthread_spin_unlock(item(self, self->mine, self->out_slot)); /* releases what was copied */
    self->out_slot = (self->out_slot + 1) % SLOTS;
    self->credit--;
}

static PyObject *Slots_write(Slots *self, PyObject *part) {
    if (!is_open(self)) return NULL;
    Py_buffer view;
    if (PyObject_GetBuffer(part, &view, PyBUF_SIMPLE) < 0) return NULL;
    if (view.len > SLOT_NBYTES) {
        PyErr_Format(PyExc_ValueError, "part: %zd bytes, expected at most %d", view.len, SLOT_NBYTES);
        PyBuffer_Release(&view);
        return NULL;
    }
    int written = find_space(self);
    if (written) put_slot(self, view.buf, view.len);
    PyBuffer_Release(&view);
    return PyBool_FromLong(written);
}

/* ---- in ---- */

static int look(Slots *self) {
    if (!self->taken && pthread_spin_trylock(item(self, self->theirs, self->in_slot)) == 0) self->taken = 1;
    return self->taken;
}

static PyObject *Slots_readable(Slots *self, PyObject *Py_UNUSED(ignored)) {
    if (!is_open(self)) return NULL;
    return PyBool_FromLong(look(self));
}

/* 0 with an error if it is closed meanwhile. */
static int came_back(Slots *self) {
    self->polls--;
    let_go(self);
    return is_open(self);
}

static int spin(Slots *self, int64_t spin_ns) {
    pthread_spinlock_t *next = item(self, self->theirs, self->in_slot);
    int found = 0;
    self->polls++;
    Py_BEGIN_ALLOW_THREADS
    int64_t end_ns = native_now_ns() + spin_ns;
    do {
        for (int looks = 0; looks < LOOKS && !found; looks++) {
            found = pthread_spin_trylock(next) == 0;
            if (!found) pause_briefly();
        }
    } while (!found && native_now_ns() < end_ns);
    Py_END_ALLOW_THREADS
    if (!came_back(self)) return 0;
    if (found) self->taken = 1;
    return 1;
}

static PyObject *Slots_poll(Slots *self, PyObject *argument) {
    double poll_us = PyFloat_AsDouble(argument);
    if (poll_us == -1.0 && PyErr_Occurred()) return NULL;
    if (!(poll_us > 0)) return PyBool_FromLong(self->taken);
    if (!is_open(self) || (!look(self) && !spin(self, (int64_t)((poll_us < 1e9 ? poll_us : 1e9) * 1e3)))) return NULL;
    return PyBool_FromLong(self->taken);
}

static void drop_slot(Slots *self) {
    self->taken = 0;
    self->in_slot = (self->in_slot + 1) % SLOTS;
    self->owed = self->in_slot % HALF ? 0 : self->in_slot / HALF ? 1 : 2; /* the half that ends here */
}

static PyObject *Slots_take(Slots *self, PyObject *sink) {
    if (!is_open(self)) return NULL;
    if (!self->taken) {
        PyErr_SetString(PyExc_ValueError, "there is no slot to read");
        return NULL;
    }
    PyObject *copy = PyBytes_FromStringAndSize((char *)slot_at(self, self->theirs, self->in_slot), SLOT_NBYTES);
    if (copy == NULL) return NULL;
    int noted = PyObject_SetAttr(sink, native_str_slot, copy);
    Py_DECREF(copy);
    if (noted < 0) return NULL;
    drop_slot(self);
    Py_RETURN_NONE;
}

static void give_back(Slots *self) {
    if (self->owed != UNRUNG) pthread_spin_unlock(space(self, self->theirs, self->owed - 1));
    self->owed = UNRUNG;
}

static PyObject *Slots_give_back(Slots *self, PyObject *Py_UNUSED(ignored)) {
    if (self->owed == 0) Py_RETURN_FALSE;
    if (!is_open(self)) return NULL;
    give_back(self);
    Py_RETURN_TRUE;
}

static PyObject *Slots_gave_back(Slots *self, PyObject *Py_UNUSED(ignored)) {
    self->owed = 0;
    Py_RETURN_NONE;
}

/* ---- sleeping ---- */

/* Whether what this side does next comes after it. */
static int set_asleep(Slots *self, int value) {
    atomic_store_explicit(asleep(self, self->mine), (unsigned char)value, memory_order_release);
    return value == AWAKE || pass_fence(self);
}

static PyObject *Slots_set_asleep(Slots *self, PyObject *argument) {
    long value = PyLong_AsLong(argument);
    if (value == -1 && PyErr_Occurred()) return NULL;
    if (!is_open(self)) return NULL;
    if (value < 0 || value > 255) {
        PyErr_Format(PyExc_ValueError, "value: %ld, expected 0 to 255", value);
        return NULL;
    }
    return PyBool_FromLong(set_asleep(self, (int)value));
}

static PyObject *Slots_peer_asleep(Slots *self, PyObject *Py_UNUSED(ignored)) {
    if (!is_open(self)) return NULL;
    return PyLong_FromLong(atomic_load_explicit(asleep(self, self->theirs), memory_order_acquire));
}

static int must_wake(Slots *self) {
    return !pass_fence(self) || atomic_load_explicit(asleep(self, self->theirs), memory_order_acquire) != 0;
}

static PyObject *Slots_must_wake(Slots *self, PyObject *Py_UNUSED(ignored)) {
    if (!is_open(self)) return NULL;
    return PyBool_FromLong(must_wake(self));
}

static PyObject *Slots_wake(Slots *self, PyObject *ring_bell) {
    if (!is_open(self)) return NULL;
    atomic_store_explicit(asleep(self, self->theirs), 0, memory_order_release);
    return PyObject_CallNoArgs(ring_bell);
}

/* ---- for fastpath.c: see native.h ---- */

int native_look(PyObject *slots) { return ((Slots *)slots)->base != NULL && look((Slots *)slots); }

int native_has_space(PyObject *slots) { return ((Slots *)slots)->base != NULL && find_space((Slots *)slots); }

void native_copy_slot(PyObject *slots, unsigned char *out) {
    Slots *self = (Slots *)slots;
    memcpy(out, slot_at(self, self->theirs, self->in_slot), SLOT_NBYTES);
}

int native_put_slot(PyObject *slots, const unsigned char *part, Py_ssize_t nbytes) {
    put_slot((Slots *)slots, part, nbytes);
    return must_wake((Slots *)slots);
}

int native_drop_slot(PyObject *slots) {
    Slots *self = (Slots *)slots;
    drop_slot(self);
    if (self->owed == 0) return 0;
    give_back(self);
    self->owed = 0;
    return must_wake(self);
}

void native_ring_bell(PyObject *slots, int fd) {
    Slots *self = (Slots *)slots;
    atomic_store_explicit(asleep(self, self->theirs), 0, memory_order_release);
    /* With the interpreter's lock, so that no other thread closes the descriptor. It fails if there are many bells, or
     * if the peer is gone. */
    ssize_t sent = send(fd, "w", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0) self->rung += sent;
}

int native_spin(PyObject *slots, int64_t spin_ns) {
    Slots *self = (Slots *)slots;
    if (self->base != NULL && !look(self) && !spin(self, spin_ns)) PyErr_Clear(); /* Python says that it was closed */
    return native_look(slots);
}

/* What came along with bells, as Stream._message of transport/stream.py holds it until note was taken of it. */
static int keep(PyObject *link, struct msghdr *message, ssize_t received) {
    PyObject *along = PyList_New(0), *held = NULL;
    for (struct cmsghdr *each = CMSG_FIRSTHDR(message); along != NULL && each != NULL;
         each = CMSG_NXTHDR(message, each)) {
        PyObject *item = Py_BuildValue("(iiy#)", each->cmsg_level, each->cmsg_type, CMSG_DATA(each),
                                       (Py_ssize_t)(each->cmsg_len - CMSG_LEN(0)));
        if (item == NULL || PyList_Append(along, item) < 0) Py_CLEAR(along);
        Py_XDECREF(item);
    }
    if (along != NULL) held = Py_BuildValue("(nNiO)", (Py_ssize_t)received, along, message->msg_flags, Py_None);
    int kept = held != NULL && PyObject_SetAttrString(link, "_message", held) == 0;
    Py_XDECREF(held);
    return kept;
}

int native_poll_ms(int64_t timeout_ns) {
    return (int)(timeout_ns < INT64_C(1000000000000) ? timeout_ns / 1000000 : 1000000);
}

int native_sleep(PyObject *slots, PyObject *link, int fd, int may_bring, int is_eager, int64_t timeout_ns) {
    Slots *self = (Slots *)slots;
    if (self->base == NULL) return 0;
    PyObject *held = may_bring ? PyObject_GetAttrString(link, "_message") : Py_NewRef(Py_None);
    int is_held = held == NULL ? -1 : PyObject_IsTrue(held); /* Python takes note of what came along before */
    Py_XDECREF(held);
    if (is_held) return is_held < 0 ? -1 : 0;
    int ordered = set_asleep(self, is_eager ? EAGER : ASLEEP);
    if (look(self) || !ordered) {
        set_asleep(self, AWAKE);
        return self->taken;
    }
    char bells[64], control[CMSG_SPACE(4 * sizeof(int))];
    struct iovec part = {bells, sizeof(bells)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (may_bring) message.msg_control = control, message.msg_controllen = sizeof(control);
    struct pollfd readable = {fd, POLLIN, 0};
    ssize_t received = -1;
    self->polls++;
    Py_BEGIN_ALLOW_THREADS
    if (timeout_ns < 0 || poll(&readable, 1, native_poll_ms(timeout_ns)) > 0)
        received = recvmsg(fd, &message, MSG_CMSG_CLOEXEC | (timeout_ns < 0 ? 0 : MSG_DONTWAIT));
    Py_END_ALLOW_THREADS
    if (!came_back(self)) PyErr_Clear();
    else set_asleep(self, AWAKE);
    if (received <= 0) return 0; /* the end, a signal, the timeout */
    if (may_bring && (message.msg_controllen > 0 || message.msg_flags & MSG_CTRUNC))
        return keep(link, &message, received) ? 0 : -1;
    self->heard += received;
    return 1;
}

static PyMemberDef Slots_members[] = {
    {"rung", T_PYSSIZET, offsetof(Slots, rung), READONLY, NULL},
    {"heard", T_PYSSIZET, offsetof(Slots, heard), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef Slots_methods[] = {
    {"has_space", (PyCFunction)Slots_has_space, METH_NOARGS, NULL},
    {"write", (PyCFunction)Slots_write, METH_O, NULL},
    {"readable", (PyCFunction)Slots_readable, METH_NOARGS, NULL},
    {"poll", (PyCFunction)Slots_poll, METH_O, NULL},
    {"take", (PyCFunction)Slots_take, METH_O, NULL},
    {"give_back", (PyCFunction)Slots_give_back, METH_NOARGS, NULL},
    {"gave_back", (PyCFunction)Slots_gave_back, METH_NOARGS, NULL},
    {"set_asleep", (PyCFunction)Slots_set_asleep, METH_O, NULL},
    {"peer_asleep", (PyCFunction)Slots_peer_asleep, METH_NOARGS, NULL},
    {"must_wake", (PyCFunction)Slots_must_wake, METH_NOARGS, NULL},
    {"wake", (PyCFunction)Slots_wake, METH_O, NULL},
    {"close", (PyCFunction)Slots_close, METH_NOARGS, NULL},
    {"leave", (PyCFunction)Slots_leave, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Slots_slots[] = {
    {Py_tp_doc, "See fastsplit.wire.shm.slots.Slots."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, Slots_init},
    {Py_tp_dealloc, Slots_dealloc},
    {Py_tp_methods, Slots_methods},
    {Py_tp_members, Slots_members},
    {0, NULL},
};

PyType_Spec native_slots_spec = {
    .name = "fastsplit._native.Slots",
    .basicsize = sizeof(Slots),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Slots_slots,
};
