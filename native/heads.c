/* Heads of messages that came before: what `Decoder.decode` of fastsplit/schema/decoder.py does with one that it has
 * validated in full; read that and descriptor.py first.
 *
 * Rules. `decode` returns a message only if the bytes before the numbers are those of a head that Python has validated,
 * and if each number passes the checks that Python would make. In every other case it returns None, nothing has
 * changed, and Python decodes the message, or says what is wrong with it. A message is a private copy (bytes): what is
 * checked is what is used. No count or offset is read from a message; those of a head come from Python.
 */

#include "native.h"

#include <string.h>

enum {
    BUCKETS = 1024, /* a power of two */
    MAX_HEADS = 512,
    MAX_WORDS = 1 << 20, /* far more than a message that is kept can have */
};

typedef struct {
    PyObject *name;
    PyObject *fixed; /* its value, if it is FIXED */
    Py_ssize_t word; /* its number, if it is not */
    unsigned char kind;
} Slot;

typedef struct Head {
    struct Head *next; /* in its bucket */
    struct Head *younger;
    uint64_t hash;
    PyObject *bytes;   /* all before the numbers */
    PyObject *message; /* the result if nothing varies */
    PyObject *plain;   /* the numbers with which `message` is the result; NULL if there are none such */
    Py_ssize_t words;  /* numbers and lengths between them */
    Py_ssize_t slots, gaps, tensors, returns;
    Py_ssize_t placements_at, returns_at; /* words */
    Slot *slot;
    Py_ssize_t *gap_at;
    uint64_t *gap, *sizes;
} Head;

typedef struct {
    PyObject_HEAD
    PyTypeObject *message_type;
    int busy; /* a message is being made: the collector may run there, and code that comes here */
    int count;
    Head *oldest, *youngest;
    Head *buckets[BUCKETS];
} Heads;

static inline uint64_t word_at(const unsigned char *at) { return native_read(at, 8); }

/* Of this process alone: a peer that sends heads cannot choose ones that meet. */
static uint64_t hash_start(void) {
    static uint64_t start = 0;
    if (start == 0) {
        PyObject *text = PyUnicode_FromString("fastsplit heads"); /* its hash is a secret of the process */
        if (text == NULL) PyErr_Clear();
        else start = (uint64_t)PyObject_Hash(text);
        Py_XDECREF(text);
    }
    return start;
}

static uint64_t hash_of(const unsigned char *bytes, Py_ssize_t nbytes) {
    uint64_t hash = hash_start() ^ (uint64_t)nbytes;
    Py_ssize_t at = 0;
    for (; at + 8 <= nbytes; at += 8) {
        hash = (hash ^ word_at(bytes + at)) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    for (; at < nbytes; at++) hash = (hash ^ bytes[at]) * 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 32);
}

static Head *find(const Heads *self, const unsigned char *bytes, Py_ssize_t nbytes, uint64_t hash) {
    Head *head = self->buckets[hash & (BUCKETS - 1)];
    while (head != NULL && !(head->hash == hash && PyBytes_GET_SIZE(head->bytes) == nbytes &&
                             memcmp(PyBytes_AS_STRING(head->bytes), bytes, (size_t)nbytes) == 0))
        head = head->next;
    return head;
}

/* A tuple of numbers. */
static PyObject *tuple_of(const unsigned char *numbers, Py_ssize_t count) {
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(word_at(numbers + 8 * i));
        if (number == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, number);
    }
    return tuple;
}

/* Bytes that the payload must have; -1 if a placement is not one that a plain tensor can have. */
static int64_t check_placements(const Head *head, const unsigned char *numbers, int *is_inline) {
    uint64_t payload = 0;
    *is_inline = 1;
    for (Py_ssize_t i = 0; i < head->tensors; i++) {
        const unsigned char *at = numbers + 8 * (head->placements_at + 3 * i);
        uint64_t segment = word_at(at), offset = word_at(at + 8);
        if (segment >> 32 || word_at(at + 16) != head->sizes[i] || (segment == 0 && offset != payload)) return -1;
        if (segment == 0) payload += head->sizes[i];
        else *is_inline = 0;
    }
    return (int64_t)payload;
}

/* The attributes; NULL without an error if one is not what Python would accept. */
static PyObject *attrs_of(const Head *head, const unsigned char *numbers) {
    PyObject *attrs = PyDict_New();
    for (Py_ssize_t i = 0; attrs != NULL && i < head->slots; i++) {
        const Slot *slot = &head->slot[i];
        PyObject *value = NULL;
        if (slot->kind == FIXED) {
            value = PyList_Check(slot->fixed) ? PyList_GetSlice(slot->fixed, 0, PyList_GET_SIZE(slot->fixed))
                                              : Py_NewRef(slot->fixed);
        } else {
            uint64_t word = word_at(numbers + 8 * slot->word);
            if (slot->kind == FLOAT) {
                double number;
                memcpy(&number, &word, 8);
                value = PyFloat_FromDouble(number);
            } else if (slot->kind == BOOL && word > 1) {
                Py_DECREF(attrs);
                return NULL;
            } else {
                value = slot->kind == BOOL ? PyBool_FromLong((long)word) : PyLong_FromLongLong((int64_t)word);
            }
        }
        if (value == NULL || PyDict_SetItem(attrs, slot->name, value) < 0) Py_CLEAR(attrs);
        Py_XDECREF(value);
    }
    return attrs;
}

static PyObject *make_message(const Heads *self, const Head *head, const unsigned char *numbers) {
    int is_inline = 1;
    for (Py_ssize_t i = 0; i < head->gaps; i++)
        if (word_at(numbers + 8 * head->gap_at[i]) != head->gap[i]) Py_RETURN_NONE;
    int64_t payload_nbytes = check_placements(head, numbers, &is_inline);
    if (payload_nbytes < 0) Py_RETURN_NONE;
    const unsigned char *returned = numbers + 8 * head->returns_at;
    for (Py_ssize_t i = 0; i < head->returns; i++) {
        uint64_t segment = word_at(returned + 16 * i);
        if (segment == 0 || segment >> 32) Py_RETURN_NONE;
    }
    PyObject *attrs = attrs_of(head, numbers), *nbytes, *placements = NULL, *returns = NULL, *message = NULL;
    if (attrs == NULL) {
        if (PyErr_Occurred()) return NULL;
        Py_RETURN_NONE;
    }
    nbytes = PyLong_FromLongLong(payload_nbytes);
    if (nbytes != NULL) placements = tuple_of(numbers + 8 * head->placements_at, is_inline ? 0 : 3 * head->tensors);
    if (placements != NULL) returns = tuple_of(returned, 2 * head->returns);
    if (returns != NULL) message = self->message_type->tp_alloc(self->message_type, 6);
    if (nbytes == NULL || placements == NULL || returns == NULL || message == NULL) {
        Py_DECREF(attrs);
        Py_XDECREF(nbytes);
        Py_XDECREF(placements);
        Py_XDECREF(returns);
        Py_XDECREF(message);
        return NULL;
    }
    PyTuple_SET_ITEM(message, 0, Py_NewRef(PyTuple_GET_ITEM(head->message, 0)));
    PyTuple_SET_ITEM(message, 1, Py_NewRef(PyTuple_GET_ITEM(head->message, 1)));
    PyTuple_SET_ITEM(message, 2, attrs);
    PyTuple_SET_ITEM(message, 3, nbytes);
    PyTuple_SET_ITEM(message, 4, placements);
    PyTuple_SET_ITEM(message, 5, returns);
    return message;
}

static PyObject *Heads_decode(Heads *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 2 || !PyBytes_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "decode: expected metadata, as bytes, and varying_nbytes");
        return NULL;
    }
    Py_ssize_t varying = PyLong_AsSsize_t(args[1]);
    if (varying == -1 && PyErr_Occurred()) return NULL;
    const unsigned char *bytes = (unsigned char *)PyBytes_AS_STRING(args[0]);
    Py_ssize_t nbytes = PyBytes_GET_SIZE(args[0]);
    if (varying < 0 || varying >= nbytes) Py_RETURN_NONE;
    Py_ssize_t cut = nbytes - varying;
    const Head *head = find(self, bytes, cut, hash_of(bytes, cut));
    if (head == NULL || varying != 8 * head->words) Py_RETURN_NONE;
    const unsigned char *numbers = bytes + cut;
    if (head->plain != NULL && memcmp(PyBytes_AS_STRING(head->plain), numbers, (size_t)varying) == 0)
        return Py_NewRef(head->message);
    if (head->words == 0 && head->slots == 0) return Py_NewRef(head->message);
    self->busy++;
    PyObject *message = make_message(self, head, numbers);
    self->busy--;
    return message;
}

/* ---- learning ---- */

static void free_head(Head *head) {
    if (head == NULL) return;
    Py_XDECREF(head->bytes);
    Py_XDECREF(head->message);
    Py_XDECREF(head->plain);
    for (Py_ssize_t i = 0; head->slot != NULL && i < head->slots; i++) {
        Py_XDECREF(head->slot[i].name);
        Py_XDECREF(head->slot[i].fixed);
    }
    PyMem_Free(head->slot);
    PyMem_Free(head->gap_at);
    PyMem_Free(head->gap);
    PyMem_Free(head->sizes);
    PyMem_Free(head);
}

static void remove_oldest(Heads *self) {
    Head *oldest = self->oldest;
    Head **link = &self->buckets[oldest->hash & (BUCKETS - 1)];
    while (*link != oldest) link = &(*link)->next;
    *link = oldest->next;
    self->oldest = oldest->younger;
    if (self->oldest == NULL) self->youngest = NULL;
    self->count--;
    free_head(oldest);
}

static int within(Py_ssize_t at, Py_ssize_t count, Py_ssize_t words) {
    return at >= 0 && count >= 0 && at <= words && count <= words - at;
}

static int read_slots(Head *head, PyObject *slots) {
    head->slots = PyTuple_GET_SIZE(slots);
    head->slot = PyMem_Calloc((size_t)head->slots + 1, sizeof(Slot));
    if (head->slot == NULL) return PyErr_NoMemory() != NULL;
    for (Py_ssize_t i = 0; i < head->slots; i++) {
        Slot *slot = &head->slot[i];
        PyObject *name, *fixed;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(slots, i), "UbnO", &name, &slot->kind, &slot->word, &fixed)) return 0;
        slot->name = Py_NewRef(name);
        slot->fixed = Py_NewRef(fixed);
        if (slot->kind > FLOAT || (slot->kind != FIXED && !within(slot->word, 1, head->words))) {
            PyErr_SetString(PyExc_ValueError, "slots: a number that does not exist");
            return 0;
        }
    }
    return 1;
}

static int read_gaps(Head *head, PyObject *gaps) {
    head->gaps = PyTuple_GET_SIZE(gaps);
    head->gap_at = PyMem_Calloc((size_t)head->gaps + 1, sizeof(Py_ssize_t));
    head->gap = PyMem_Calloc((size_t)head->gaps + 1, sizeof(uint64_t));
    if (head->gap_at == NULL || head->gap == NULL) return PyErr_NoMemory() != NULL;
    for (Py_ssize_t i = 0; i < head->gaps; i++) {
        unsigned long long value;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(gaps, i), "nK", &head->gap_at[i], &value)) return 0;
        head->gap[i] = value;
        if (!within(head->gap_at[i], 1, head->words)) {
            PyErr_SetString(PyExc_ValueError, "gaps: a word that does not exist");
            return 0;
        }
    }
    return 1;
}

static int read_sizes(Head *head, PyObject *sizes) {
    head->tensors = PyTuple_GET_SIZE(sizes);
    head->sizes = PyMem_Calloc((size_t)head->tensors + 1, sizeof(uint64_t));
    if (head->sizes == NULL) return PyErr_NoMemory() != NULL;
    for (Py_ssize_t i = 0; i < head->tensors; i++) {
        head->sizes[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(sizes, i));
        if (PyErr_Occurred()) return 0;
    }
    return 1;
}

/* add(head, message, plain, words, slots, gaps, sizes, placements_at, returns_at, returns) */
static PyObject *Heads_add(Heads *self, PyObject *args) {
    PyObject *bytes, *message, *plain, *slots, *gaps, *sizes;
    if (self->message_type == NULL) {
        PyErr_SetString(PyExc_TypeError, "Heads: not initialized");
        return NULL;
    }
    Head *head = PyMem_Calloc(1, sizeof(Head));
    if (head == NULL) return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "SO!OnO!O!O!nnn", &bytes, self->message_type, &message, &plain, &head->words,
                          &PyTuple_Type, &slots, &PyTuple_Type, &gaps, &PyTuple_Type, &sizes, &head->placements_at,
                          &head->returns_at, &head->returns))
        goto failed;
    head->bytes = Py_NewRef(bytes);
    head->message = Py_NewRef(message);
    head->plain = plain == Py_None ? NULL : Py_NewRef(plain);
    if (!read_slots(head, slots) || !read_gaps(head, gaps) || !read_sizes(head, sizes)) goto failed;
    if (head->words < 0 || head->words > MAX_WORDS || (head->plain != NULL && (!PyBytes_CheckExact(head->plain) ||
                                                    PyBytes_GET_SIZE(head->plain) != 8 * head->words)) ||
        head->returns > head->words || !within(head->placements_at, 3 * head->tensors, head->words) ||
        !within(head->returns_at, 2 * head->returns, head->words)) {
        PyErr_SetString(PyExc_ValueError, "add: numbers that do not exist");
        goto failed;
    }
    const unsigned char *start = (unsigned char *)PyBytes_AS_STRING(bytes);
    head->hash = hash_of(start, PyBytes_GET_SIZE(bytes));
    if (self->busy || find(self, start, PyBytes_GET_SIZE(bytes), head->hash) != NULL) { /* or: of another length */
        free_head(head);
        Py_RETURN_NONE;
    }
    if (self->count >= MAX_HEADS) remove_oldest(self);
    Head **bucket = &self->buckets[head->hash & (BUCKETS - 1)];
    head->next = *bucket;
    *bucket = head;
    if (self->youngest != NULL) self->youngest->younger = head;
    else self->oldest = head;
    self->youngest = head;
    self->count++;
    Py_RETURN_NONE;
failed:
    free_head(head);
    return NULL;
}

static int Heads_init(Heads *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"message_type", NULL};
    PyTypeObject *type;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!", names, &PyType_Type, &type)) return -1;
    if (!PyType_IsSubtype(type, &PyTuple_Type) || self->message_type != NULL) {
        PyErr_SetString(PyExc_TypeError, "message_type: expected a subclass of tuple, once");
        return -1;
    }
    self->message_type = (PyTypeObject *)Py_NewRef(type);
    return 0;
}

static void Heads_dealloc(Heads *self) {
    while (self->oldest != NULL) remove_oldest(self);
    Py_XDECREF(self->message_type);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *Heads_clear(Heads *self, PyObject *Py_UNUSED(ignored)) {
    while (!self->busy && self->oldest != NULL) remove_oldest(self);
    Py_RETURN_NONE;
}

static Py_ssize_t Heads_length(Heads *self) { return self->count; }

static PyMethodDef Heads_methods[] = {
    {"clear", (PyCFunction)Heads_clear, METH_NOARGS, NULL},
    {"decode", (PyCFunction)(void (*)(void))Heads_decode, METH_FASTCALL, NULL},
    {"add", (PyCFunction)Heads_add, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Heads_slots[] = {
    {Py_tp_doc, "Heads of messages that were validated before; see fastsplit.schema.decoder."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, Heads_init},
    {Py_tp_dealloc, Heads_dealloc},
    {Py_tp_methods, Heads_methods},
    {Py_sq_length, Heads_length},
    {0, NULL},
};

PyType_Spec native_heads_spec = {
    .name = "fastsplit._native.Heads",
    .basicsize = sizeof(Heads),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Heads_slots,
};
