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

enum { MAX_WORDS = 1 << 20 }; /* far more than a message that is kept can have */

typedef struct {
    NativeEntry entry;
    PyObject *bytes;   /* all before the numbers */
    PyObject *message; /* the result if nothing varies */
    PyObject *plain;   /* the numbers with which `message` is the result, or None */
    PyObject *slots;   /* of each attribute: name, kind, its number's word, its value if it is FIXED */
    PyObject *gaps;    /* of each length among the numbers: word, value */
    Py_ssize_t words;  /* numbers and lengths between them */
    Py_ssize_t placements_at, returns_at, returns; /* words, words, how many */
} Head;

typedef struct {
    PyObject_HEAD PyTypeObject *message_type;
    int busy; /* a message is being made: the collector may run there, and code that comes here */
    NativeTable table;
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

/* Heads that differ in the numbers behind them alone are of messages with more returns or fewer. */
static Head *find(Heads *self, const unsigned char *bytes, Py_ssize_t nbytes, Py_ssize_t words, uint64_t hash) {
    Head *head = (Head *)*native_bucket(&self->table, hash);
    while (head != NULL &&
           !(head->entry.hash == hash && head->words == words && PyBytes_GET_SIZE(head->bytes) == nbytes &&
             memcmp(PyBytes_AS_STRING(head->bytes), bytes, (size_t)nbytes) == 0))
        head = (Head *)head->entry.next;
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

static inline Py_ssize_t item_of(PyObject *tuple, Py_ssize_t at) {
    return PyLong_AsSsize_t(PyTuple_GET_ITEM(tuple, at));
}

/* Bytes that the payload must have; -1 if a placement is not one that a plain tensor can have. */
static int64_t check_placements(const Head *head, const unsigned char *numbers, int *is_inline) {
    PyObject *tensors = PyTuple_GET_ITEM(head->message, 1);
    uint64_t payload = 0;
    *is_inline = 1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); i++) {
        const unsigned char *at = numbers + 8 * (head->placements_at + 3 * i);
        uint64_t segment = word_at(at), offset = word_at(at + 8),
                 nbytes = (uint64_t)item_of(PyTuple_GET_ITEM(tensors, i), 2);
        if (segment >> 32 || word_at(at + 16) != nbytes || (segment == 0 && offset != payload)) return -1;
        if (segment == 0) payload += nbytes;
        else *is_inline = 0;
    }
    return (int64_t)payload;
}

/* The attributes; NULL without an error if one is not what Python would accept. */
static PyObject *attrs_of(const Head *head, const unsigned char *numbers) {
    PyObject *attrs = PyDict_New();
    for (Py_ssize_t i = 0; attrs != NULL && i < PyTuple_GET_SIZE(head->slots); i++) {
        PyObject *slot = PyTuple_GET_ITEM(head->slots, i), *fixed = PyTuple_GET_ITEM(slot, 3), *value = NULL;
        Py_ssize_t kind = item_of(slot, 1);
        uint64_t word = kind == FIXED ? 0 : word_at(numbers + 8 * item_of(slot, 2));
        if (kind == BOOL && word > 1) {
            Py_DECREF(attrs);
            return NULL;
        }
        if (kind == FIXED) {
            value = PyList_Check(fixed) ? PyList_GetSlice(fixed, 0, PyList_GET_SIZE(fixed)) : Py_NewRef(fixed);
        } else if (kind == FLOAT) {
            double number;
            memcpy(&number, &word, 8);
            value = PyFloat_FromDouble(number);
        } else {
            value = kind == BOOL ? PyBool_FromLong((long)word) : PyLong_FromLongLong((int64_t)word);
        }
        if (value == NULL || PyDict_SetItem(attrs, PyTuple_GET_ITEM(slot, 0), value) < 0) Py_CLEAR(attrs);
        Py_XDECREF(value);
    }
    return attrs;
}

static PyObject *make_message(const Heads *self, const Head *head, const unsigned char *numbers) {
    int is_inline = 1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(head->gaps); i++) {
        PyObject *gap = PyTuple_GET_ITEM(head->gaps, i);
        if (word_at(numbers + 8 * item_of(gap, 0)) != (uint64_t)item_of(gap, 1)) Py_RETURN_NONE;
    }
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
    if (nbytes != NULL)
        placements = tuple_of(numbers + 8 * head->placements_at,
                              is_inline ? 0 : 3 * PyTuple_GET_SIZE(PyTuple_GET_ITEM(head->message, 1)));
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

PyObject *native_decode(PyObject *heads, const unsigned char *bytes, Py_ssize_t nbytes, Py_ssize_t varying) {
    Heads *self = (Heads *)heads;
    if (varying < 0 || varying >= nbytes) Py_RETURN_NONE;
    Py_ssize_t cut = nbytes - varying;
    const Head *head = varying % 8 ? NULL : find(self, bytes, cut, varying / 8, hash_of(bytes, cut));
    if (head == NULL) Py_RETURN_NONE;
    const unsigned char *numbers = bytes + cut;
    if (head->plain != Py_None && memcmp(PyBytes_AS_STRING(head->plain), numbers, (size_t)varying) == 0)
        return Py_NewRef(head->message);
    if (head->words == 0 && PyTuple_GET_SIZE(head->slots) == 0) return Py_NewRef(head->message);
    self->busy++;
    PyObject *message = make_message(self, head, numbers);
    self->busy--;
    return message;
}

static PyObject *Heads_decode(Heads *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 2 || !PyBytes_CheckExact(args[0])) {
        PyErr_SetString(PyExc_TypeError, "decode: expected metadata, as bytes, and varying_nbytes");
        return NULL;
    }
    Py_ssize_t varying = PyLong_AsSsize_t(args[1]);
    if (varying == -1 && PyErr_Occurred()) return NULL;
    return native_decode((PyObject *)self, (unsigned char *)PyBytes_AS_STRING(args[0]), PyBytes_GET_SIZE(args[0]),
                         varying);
}

/* ---- learning ---- */

static void free_head(Head *head) {
    if (head == NULL) return;
    Py_XDECREF(head->bytes);
    Py_XDECREF(head->message);
    Py_XDECREF(head->plain);
    Py_XDECREF(head->slots);
    Py_XDECREF(head->gaps);
    PyMem_Free(head);
}

static int within(Py_ssize_t at, Py_ssize_t count, Py_ssize_t words) {
    return at >= 0 && count >= 0 && at <= words && count <= words - at;
}

/* Whether all of a head is what the code above takes it for. */
static int is_sound(const Head *head) {
    PyObject *tensors = PyTuple_GET_ITEM(head->message, 1), *name, *fixed;
    if (head->words < 0 || head->words > MAX_WORDS || head->returns < 0 || head->returns > head->words ||
        !PyTuple_Check(tensors) || !within(head->placements_at, 3 * PyTuple_GET_SIZE(tensors), head->words) ||
        !within(head->returns_at, 2 * head->returns, head->words) ||
        (head->plain != Py_None &&
         (!PyBytes_CheckExact(head->plain) || PyBytes_GET_SIZE(head->plain) != 8 * head->words)))
        return 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); i++) {
        PyObject *desc = PyTuple_GET_ITEM(tensors, i);
        if (!PyTuple_Check(desc) || PyTuple_GET_SIZE(desc) != 3 || item_of(desc, 2) < 0) return 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(head->slots); i++) {
        Py_ssize_t kind, word;
        if (!PyTuple_Check(PyTuple_GET_ITEM(head->slots, i)) ||
            !PyArg_ParseTuple(PyTuple_GET_ITEM(head->slots, i), "UnnO", &name, &kind, &word, &fixed) || kind < FIXED ||
            kind > FLOAT || (kind != FIXED && !within(word, 1, head->words)))
            return 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(head->gaps); i++) {
        Py_ssize_t word, value;
        if (!PyTuple_Check(PyTuple_GET_ITEM(head->gaps, i)) ||
            !PyArg_ParseTuple(PyTuple_GET_ITEM(head->gaps, i), "nn", &word, &value) || !within(word, 1, head->words))
            return 0;
    }
    return 1;
}

/* add(head, message, plain, words, slots, gaps, placements_at, returns_at, returns) */
static PyObject *Heads_add(Heads *self, PyObject *args) {
    if (self->message_type == NULL) {
        PyErr_SetString(PyExc_TypeError, "Heads: not initialized");
        return NULL;
    }
    Head *head = PyMem_Calloc(1, sizeof(Head)), read = {.words = 0};
    if (head == NULL) return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "SO!OnO!O!nnn", &read.bytes, self->message_type, &read.message, &read.plain,
                          &read.words, &PyTuple_Type, &read.slots, &PyTuple_Type, &read.gaps, &read.placements_at,
                          &read.returns_at, &read.returns) ||
        !is_sound(&read)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "add: numbers that do not exist");
        PyMem_Free(head);
        return NULL;
    }
    *head = read;
    PyObject *bytes = Py_NewRef(head->bytes);
    Py_INCREF(head->message);
    Py_INCREF(head->plain);
    Py_INCREF(head->slots);
    Py_INCREF(head->gaps);
    const unsigned char *start = (unsigned char *)PyBytes_AS_STRING(bytes);
    head->entry.hash = hash_of(start, PyBytes_GET_SIZE(bytes));
    if (self->busy || find(self, start, PyBytes_GET_SIZE(bytes), head->words, head->entry.hash) != NULL)
        free_head(head);
    else free_head((Head *)native_add(&self->table, &head->entry));
    Py_RETURN_NONE;
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

static void forget(Heads *self) {
    while (self->table.oldest != NULL) free_head((Head *)native_take_oldest(&self->table));
}

static void Heads_dealloc(Heads *self) {
    forget(self);
    Py_XDECREF(self->message_type);
    native_free(self);
}

static PyObject *Heads_clear(Heads *self, PyObject *Py_UNUSED(ignored)) {
    if (!self->busy) forget(self);
    Py_RETURN_NONE;
}

static Py_ssize_t Heads_length(Heads *self) { return self->table.count; }

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
