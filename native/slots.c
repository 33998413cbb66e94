/* The slots of a ring in shared memory: what fastsplit/wire/shm/slots.py does, step for step; read that first.
 *
 * Rules. Nothing in shared memory is trusted: no index, no length and no pointer is read from it; a slot is copied out
 * in one memcpy. Semaphores are libc's spin locks, as in Python, so that both work on one ring: locked means taken. The
 * interpreter's lock is held in every method but `poll`, which lets it go while it looks, and touches nothing but the
 * semaphore then; if `close` comes meanwhile, the memory is let go when the last `poll` ends.
 */

#include "native.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

enum {
    SLOTS = 64,
    SLOT_NBYTES = 1024,
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
    MAX_TRIES = 1000,
    LOOKS = 32, /* between two looks at the clock */
};

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    unsigned char *base; /* NULL once it is closed */
    int mine, theirs;    /* directions: 0 is the client's */
    int out_slot, in_slot;
    int credit; /* slots that may be written */
    int taken;  /* whether the next slot may be read */
    int polls;  /* calls of `poll` that are looking now, without the interpreter's lock */
    int owed;   /* the half (1 or 2) that was read and is to be given to the peer, UNRUNG if it was; 0 for none */
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
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
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
    if (written) {
        memcpy(slot_at(self, self->mine, self->out_slot), view.buf, (size_t)view.len);
        pthread_spin_unlock(item(self, self->mine, self->out_slot)); /* releases what was copied */
        self->out_slot = (self->out_slot + 1) % SLOTS;
        self->credit--;
    }
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

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static PyObject *Slots_poll(Slots *self, PyObject *argument) {
    double poll_us = PyFloat_AsDouble(argument);
    if (poll_us == -1.0 && PyErr_Occurred()) return NULL;
    if (!(poll_us > 0)) return PyBool_FromLong(self->taken);
    if (!is_open(self)) return NULL;
    if (!look(self)) {
        pthread_spinlock_t *next = item(self, self->theirs, self->in_slot);
        int found = 0;
        self->polls++;
        Py_BEGIN_ALLOW_THREADS
        int64_t end_ns = now_ns() + (int64_t)((poll_us < 1e9 ? poll_us : 1e9) * 1e3);
        do {
            for (int looks = 0; looks < LOOKS && !found; looks++) {
                found = pthread_spin_trylock(next) == 0;
                if (!found) pause_briefly();
            }
        } while (!found && now_ns() < end_ns);
        Py_END_ALLOW_THREADS
        self->polls--;
        if (self->base == NULL) {
            let_go(self);
            is_open(self); /* sets the error */
            return NULL;
        }
        if (found) self->taken = 1;
    }
    return PyBool_FromLong(self->taken);
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
    self->taken = 0;
    self->in_slot = (self->in_slot + 1) % SLOTS;
    self->owed = self->in_slot % HALF ? 0 : self->in_slot / HALF ? 1 : 2; /* the half that ends here */
    Py_RETURN_NONE;
}

static PyObject *Slots_give_back(Slots *self, PyObject *Py_UNUSED(ignored)) {
    if (self->owed == 0) Py_RETURN_FALSE;
    if (!is_open(self)) return NULL;
    if (self->owed != UNRUNG) {
        pthread_spin_unlock(space(self, self->theirs, self->owed - 1));
        self->owed = UNRUNG;
    }
    Py_RETURN_TRUE;
}

static PyObject *Slots_gave_back(Slots *self, PyObject *Py_UNUSED(ignored)) {
    self->owed = 0;
    Py_RETURN_NONE;
}

/* ---- sleeping ---- */

static PyObject *Slots_set_asleep(Slots *self, PyObject *argument) {
    long value = PyLong_AsLong(argument);
    if (value == -1 && PyErr_Occurred()) return NULL;
    if (!is_open(self)) return NULL;
    if (value < 0 || value > 255) {
        PyErr_Format(PyExc_ValueError, "value: %ld, expected 0 to 255", value);
        return NULL;
    }
    atomic_store_explicit(asleep(self, self->mine), (unsigned char)value, memory_order_release);
    return PyBool_FromLong(pass_fence(self));
}

static PyObject *Slots_peer_asleep(Slots *self, PyObject *Py_UNUSED(ignored)) {
    if (!is_open(self)) return NULL;
    return PyLong_FromLong(atomic_load_explicit(asleep(self, self->theirs), memory_order_acquire));
}

static PyObject *Slots_must_wake(Slots *self, PyObject *Py_UNUSED(ignored)) {
    if (!is_open(self)) return NULL;
    if (!pass_fence(self)) Py_RETURN_TRUE;
    return PyBool_FromLong(atomic_load_explicit(asleep(self, self->theirs), memory_order_acquire) != 0);
}

static PyObject *Slots_wake(Slots *self, PyObject *ring_bell) {
    if (!is_open(self)) return NULL;
    atomic_store_explicit(asleep(self, self->theirs), 0, memory_order_release);
    return PyObject_CallNoArgs(ring_bell);
}

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
    {0, NULL},
};

PyType_Spec native_slots_spec = {
    .name = "fastsplit._native.Slots",
    .basicsize = sizeof(Slots),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Slots_slots,
};
