/* Templates of messages to send: what `Encoder.encode` of fastsplit/schema/encoder.py does with a shape that it has
 * built before; read that and descriptor.py first.
 *
 * Rules. What this code does not take (a shape that is new, a number beyond 64 bits, a value of another type) it leaves
 * to Python, which makes the message or raises: `encode` returns None then, and nothing has changed. It calls no method
 * of a value. No count or offset comes from a peer.
 */

#include "native.h"

#include <string.h>

typedef struct {
    NativeEntry entry;
    PyObject *op;
    PyObject *metadata; /* bytes: headroom and message, tensors inline, numbers 0 */
    Py_ssize_t varying_nbytes;
    int desc_words, tensors, returns, attrs, ints, floats;
    int64_t *desc; /* of each tensor: dtype code, number of dimensions, dimensions */
    unsigned char *kinds;
    PyObject **names; /* of the attributes */
    PyObject **fixed; /* values of those that are FIXED, else NULL */
} Template;

typedef struct {
    PyObject_HEAD int typed;
    NativeTable table;
} Templates;

static inline uint64_t mix(uint64_t hash, uint64_t word) {
    hash ^= word;
    hash *= 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 29);
}

/* An exact int of 64 bits. 0: it is none, and no error is set. */
static inline int int64_of(PyObject *value, int64_t *out) {
    if (!PyLong_CheckExact(value)) return 0;
    int overflow;
    long long found = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow || (found == -1 && PyErr_Occurred())) {
        PyErr_Clear();
        return 0;
    }
    *out = found;
    return 1;
}

static int read_tensors(Shape *shape, PyObject *items) {
    Py_ssize_t count = native_count(items);
    int words = 0, known = count >= 0 && count <= MAX_DESC_WORDS / 2;
    for (Py_ssize_t i = 0; known && i < count; i++) {
        PyObject *tensor = PySequence_Fast_GET_ITEM(items, i);
        PyObject *dims = PyTuple_Check(tensor) && PyTuple_GET_SIZE(tensor) == 2 ? PyTuple_GET_ITEM(tensor, 1) : NULL;
        known = dims != NULL && PyTuple_Check(dims) && words + 2 + PyTuple_GET_SIZE(dims) <= MAX_DESC_WORDS &&
                int64_of(PyTuple_GET_ITEM(tensor, 0), &shape->desc[words]);
        if (!known) break;
        Py_ssize_t ndim = PyTuple_GET_SIZE(dims);
        shape->desc[words + 1] = ndim;
        words += 2;
        for (Py_ssize_t d = 0; known && d < ndim; d++)
            known = int64_of(PyTuple_GET_ITEM(dims, d), &shape->desc[words++]);
    }
    shape->tensors = (int)count;
    shape->desc_words = words;
    return known;
}

static int read_attrs(Shape *shape, PyObject *attrs, int typed) {
    if (!PyDict_CheckExact(attrs) || PyDict_GET_SIZE(attrs) > MAX_ATTRS) return 0;
    PyObject *name, *value;
    Py_ssize_t at = 0;
    int count = 0;
    shape->ints = shape->floats = 0;
    while (PyDict_Next(attrs, &at, &name, &value)) {
        if (!PyUnicode_CheckExact(name)) return 0;
        shape->names[count] = name;
        shape->values[count] = NULL;
        if (PyLong_CheckExact(value)) {
            if (!int64_of(value, &shape->int_values[shape->ints++])) return 0;
            shape->kinds[count] = INT;
        } else if (PyBool_Check(value) && typed) {
            shape->int_values[shape->ints++] = value == Py_True;
            shape->kinds[count] = BOOL;
        } else if (PyFloat_CheckExact(value)) {
            shape->float_values[shape->floats++] = PyFloat_AS_DOUBLE(value);
            shape->kinds[count] = FLOAT;
        } else if (PyUnicode_CheckExact(value) || PyBytes_CheckExact(value)) {
            shape->values[count] = value;
            shape->kinds[count] = FIXED;
        } else {
            return 0;
        }
        count++;
    }
    shape->attrs = count;
    return 1;
}

int native_read_attrs(PyObject *templates, Shape *shape, PyObject *op, PyObject *attrs, Py_ssize_t returns) {
    if (!PyUnicode_CheckExact(op) || returns > MAX_RETURN_WORDS / 2 ||
        !read_attrs(shape, attrs, ((Templates *)templates)->typed))
        return 0;
    shape->op = op;
    shape->returns = (int)returns;
    Py_hash_t hash = PyObject_Hash(op); /* of an exact string, as those below and of bytes */
    if (hash == -1) {
        PyErr_Clear();
        return 0;
    }
    uint64_t mixed = mix((uint64_t)hash, (uint64_t)shape->returns << 32 | (uint64_t)shape->attrs);
    for (int i = 0; i < shape->desc_words; i++) mixed = mix(mixed, (uint64_t)shape->desc[i]);
    for (int i = 0; i < shape->attrs; i++) {
        mixed = mix(mixed, (uint64_t)PyObject_Hash(shape->names[i]) << 2 ^ shape->kinds[i]);
        if (shape->kinds[i] == FIXED) mixed = mix(mixed, (uint64_t)PyObject_Hash(shape->values[i]));
    }
    shape->hash = mixed;
    return 1;
}

/* Of exact strings and bytes, whose comparison runs no other code. */
static inline int same(PyObject *one, PyObject *other) {
    return one == other || (Py_TYPE(one) == Py_TYPE(other) && PyObject_RichCompareBool(one, other, Py_EQ) == 1);
}

static int fits(const Template *template, const Shape *shape) {
    if (template->entry.hash != shape->hash || template->desc_words != shape->desc_words ||
        template->tensors != shape->tensors || template->returns != shape->returns || template->attrs != shape->attrs ||
        !same(template->op, shape->op) ||
        memcmp(template->desc, shape->desc, sizeof(int64_t) * (size_t)shape->desc_words) != 0 ||
        memcmp(template->kinds, shape->kinds, (size_t)shape->attrs) != 0)
        return 0;
    for (int i = 0; i < shape->attrs; i++) {
        if (!same(template->names[i], shape->names[i]) ||
            (shape->kinds[i] == FIXED && !same(template->fixed[i], shape->values[i])))
            return 0;
    }
    return 1;
}

static Template *find(Templates *self, const Shape *shape) {
    Template *template = (Template *)*native_bucket(&self->table, shape->hash);
    while (template != NULL && !fits(template, shape)) template = (Template *)template->entry.next;
    return template;
}

static unsigned char *put(unsigned char *at, const uint64_t *words, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++, at += 8) native_write(at, words[i], 8);
    return at;
}

/* Writes a message: its template with its numbers. The lengths between these are in the template. */
static void fill(const Template *template, const Shape *shape, const uint64_t *placed, const uint64_t *returned,
                 unsigned char *out) {
    Py_ssize_t nbytes = PyBytes_GET_SIZE(template->metadata);
    memcpy(out, PyBytes_AS_STRING(template->metadata), (size_t)nbytes);
    unsigned char *at = out + nbytes - template->varying_nbytes;
    at = put(at, (const uint64_t *)shape->int_values, shape->ints);
    if (shape->floats && shape->ints) at += 8;
    for (int i = 0; i < shape->floats; i++) {
        uint64_t word;
        memcpy(&word, &shape->float_values[i], 8);
        at = put(at, &word, 1);
    }
    if (shape->tensors && (shape->ints || shape->floats)) at += 8;
    at = placed != NULL ? put(at, placed, 3 * shape->tensors) : at + 24 * (Py_ssize_t)shape->tensors;
    if (shape->returns && (shape->ints || shape->floats || shape->tensors)) at += 8;
    put(at, returned, 2 * shape->returns);
}

Py_ssize_t native_fill(PyObject *templates, const Shape *shape, const uint64_t *placed, const uint64_t *returned,
                       unsigned char *out, Py_ssize_t size, Py_ssize_t *varying) {
    const Template *template = find((Templates *)templates, shape);
    if (template == NULL || PyBytes_GET_SIZE(template->metadata) > size) return -1;
    fill(template, shape, placed, returned, out);
    *varying = template->varying_nbytes;
    return PyBytes_GET_SIZE(template->metadata);
}

/* Ints of a flat list or tuple. 0: not all are. */
static int read_words(PyObject *items, uint64_t *words) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items); i++) {
        PyObject *item = PySequence_Fast_GET_ITEM(items, i);
        words[i] = PyLong_CheckExact(item) ? PyLong_AsUnsignedLongLong(item) : UINT64_MAX;
        if (words[i] == UINT64_MAX) { /* no segment, offset or size is as large as that */
            PyErr_Clear();
            return 0;
        }
    }
    return 1;
}

static PyObject *Templates_encode(Templates *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 5) {
        PyErr_Format(PyExc_TypeError, "encode: %zd arguments, expected 5", nargs);
        return NULL;
    }
    Py_ssize_t placed = native_count(args[3]), returned = native_count(args[4]);
    Shape shape;
    uint64_t placements[MAX_PLACED_WORDS], returns[MAX_RETURN_WORDS];
    if (placed < 0 || placed > MAX_PLACED_WORDS || returned < 0 || returned > MAX_RETURN_WORDS || returned % 2 ||
        !read_tensors(&shape, args[1]) || !native_read_attrs((PyObject *)self, &shape, args[0], args[2], returned / 2))
        Py_RETURN_NONE;
    const Template *template = find(self, &shape);
    if (template == NULL || (placed && placed != 3 * (Py_ssize_t)shape.tensors) || !read_words(args[3], placements) ||
        !read_words(args[4], returns))
        Py_RETURN_NONE;
    PyObject *out = PyByteArray_FromStringAndSize(NULL, PyBytes_GET_SIZE(template->metadata));
    if (out == NULL) return NULL;
    fill(template, &shape, placed ? placements : NULL, returns, (unsigned char *)PyByteArray_AS_STRING(out));
    return Py_BuildValue("(Nn)", out, template->varying_nbytes);
}

static void free_template(Template *template) {
    if (template == NULL) return;
    Py_XDECREF(template->op);
    Py_XDECREF(template->metadata);
    for (int i = 0; i < 2 * template->attrs; i++) Py_XDECREF(template->names[i]); /* and values */
    PyMem_Free(template);
}

/* Bytes of the numbers at a message's end: see Tail of descriptor.py. */
static Py_ssize_t tail_nbytes(const Shape *shape) {
    int counts[4] = {shape->ints, shape->floats, shape->tensors, shape->returns}, words[4] = {1, 1, 3, 2};
    Py_ssize_t total = 0;
    for (int i = 0; i < 4; i++) {
        if (counts[i] && total) total++;
        total += (Py_ssize_t)counts[i] * words[i];
    }
    return 8 * total;
}

static PyObject *Templates_add(Templates *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs != 6 || !PyBytes_CheckExact(args[4])) {
        PyErr_SetString(PyExc_TypeError, "add: expected op, tensors, attrs, len(returns), metadata and varying_nbytes");
        return NULL;
    }
    Py_ssize_t returned = PyLong_AsSsize_t(args[3]), varying_nbytes = PyLong_AsSsize_t(args[5]);
    if (PyErr_Occurred()) return NULL;
    Shape shape;
    if (returned < 0 || returned % 2 || !read_tensors(&shape, args[1]) ||
        !native_read_attrs((PyObject *)self, &shape, args[0], args[2], returned / 2) || find(self, &shape) != NULL)
        Py_RETURN_NONE;
    if (varying_nbytes != tail_nbytes(&shape) || varying_nbytes > PyBytes_GET_SIZE(args[4])) Py_RETURN_NONE;
    size_t attrs = (size_t)shape.attrs, words = (size_t)shape.desc_words;
    Template *template = PyMem_Calloc(1, sizeof(Template) + 8 * words + (2 * sizeof(PyObject *) + 1) * attrs);
    if (template == NULL) return PyErr_NoMemory();
    template->desc = (int64_t *)(template + 1);
    template->names = (PyObject **)(template->desc + words);
    template->fixed = template->names + attrs;
    template->kinds = (unsigned char *)(template->fixed + attrs);
    memcpy(template->desc, shape.desc, 8 * words);
    memcpy(template->kinds, shape.kinds, attrs);
    for (int i = 0; i < shape.attrs; i++) {
        template->names[i] = Py_NewRef(shape.names[i]);
        template->fixed[i] = Py_XNewRef(shape.values[i]);
    }
    template->entry.hash = shape.hash;
    template->op = Py_NewRef(shape.op);
    template->metadata = Py_NewRef(args[4]);
    template->varying_nbytes = varying_nbytes;
    template->desc_words = shape.desc_words;
    template->tensors = shape.tensors;
    template->returns = shape.returns;
    template->attrs = shape.attrs;
    template->ints = shape.ints;
    template->floats = shape.floats;
    free_template((Template *)native_add(&self->table, &template->entry));
    Py_RETURN_NONE;
}

static int Templates_init(Templates *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"typed", NULL};
    return PyArg_ParseTupleAndKeywords(args, kwargs, "$p", names, &self->typed) ? 0 : -1;
}

static void forget(Templates *self) {
    while (self->table.oldest != NULL) free_template((Template *)native_take_oldest(&self->table));
}

static void Templates_dealloc(Templates *self) {
    forget(self);
    native_free(self);
}

static PyObject *Templates_clear(Templates *self, PyObject *Py_UNUSED(ignored)) {
    forget(self);
    Py_RETURN_NONE;
}

static Py_ssize_t Templates_length(Templates *self) { return self->table.count; }

static PyMethodDef Templates_methods[] = {
    {"clear", (PyCFunction)Templates_clear, METH_NOARGS, NULL},
    {"encode", (PyCFunction)(void (*)(void))Templates_encode, METH_FASTCALL, NULL},
    {"add", (PyCFunction)(void (*)(void))Templates_add, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Templates_slots[] = {
    {Py_tp_doc, "Shapes of messages to send that were built before; see fastsplit.schema.encoder."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, Templates_init},
    {Py_tp_dealloc, Templates_dealloc},
    {Py_tp_methods, Templates_methods},
    {Py_sq_length, Templates_length},
    {0, NULL},
};

PyType_Spec native_templates_spec = {
    .name = "fastsplit._native.Templates",
    .basicsize = sizeof(Templates),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Templates_slots,
};
