/* Tensors that go out by reference: what `share` of fastsplit/tensors/outgoing.py does with those that lie in shared
 * memory; read that and checks.py first.
 *
 * Rules. Taken here are numpy's exact ndarray and torch's exact Tensor: row-major, of a plain dtype, not empty, and in a
 * segment of the connection, whose memory cannot be resized. If one tensor of a message is anything else, Python looks
 * at all of them: nothing has happened yet.
 */

#include "native.h"

#include <string.h>

/* ---- DLPack's exchange of tensors in C: dlpack.h, version 1.3, as far as it is used ---- */

typedef struct {
    uint32_t major, minor;
} DLPackVersion;

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides; /* strides may be NULL: row-major */
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    DLPackVersion version;
    void *prev_api;
    int (*managed_tensor_allocator)(void);
    int (*managed_tensor_from_py_object_no_sync)(void);
    int (*managed_tensor_to_py_object_no_sync)(void);
    int (*dltensor_from_py_object_no_sync)(void *py_object, DLTensor *out); /* may be NULL */
} DLPackExchangeAPI;

enum { DL_CPU = 1, DL_MAJOR = 1, MAX_DIMS = 32 };

typedef struct {
    const char *name;     /* of fastsplit/schema/dtypes.py */
    uint8_t dl_code, bits; /* DLPack's */
    char kind;            /* of a buffer's format: signed, unsigned, float, boolean; 0: numpy has no such dtype */
    int code;             /* ours */
} DType;

static DType dtypes[] = {
    {"bool", 6, 8, 'b', 0},      {"uint8", 1, 8, 'u', 0},       {"int8", 0, 8, 'i', 0},
    {"uint16", 1, 16, 'u', 0},   {"int16", 0, 16, 'i', 0},      {"uint32", 1, 32, 'u', 0},
    {"int32", 0, 32, 'i', 0},    {"uint64", 1, 64, 'u', 0},     {"int64", 0, 64, 'i', 0},
    {"float16", 2, 16, 'f', 0},  {"bfloat16", 4, 16, 0, 0},     {"float32", 2, 32, 'f', 0},
    {"float64", 2, 64, 'f', 0},  {"float8_e4m3fn", 10, 8, 0, 0}, {"float8_e5m2", 12, 8, 0, 0},
};

enum { DTYPES = sizeof(dtypes) / sizeof(dtypes[0]) };

static PyTypeObject *ndarray_type, *outgoing_type;
static PyObject *share_reference;
static PyTypeObject *torch_type; /* NULL until a torch tensor was sent */
static const DLPackExchangeAPI *torch_api;
static PyObject *str_place, *str_is_neg, *str_dtype, *str_metadata;

static PyObject *attribute_of(const char *module, const char *name) {
    PyObject *imported = PyImport_ImportModule(module);
    if (imported == NULL) return NULL;
    PyObject *found = PyObject_GetAttrString(imported, name);
    Py_DECREF(imported);
    return found;
}

int native_init_tensors(void) {
    ndarray_type = (PyTypeObject *)attribute_of("numpy", "ndarray");
    outgoing_type = (PyTypeObject *)attribute_of("fastsplit.tensors.outgoing", "Outgoing");
    share_reference = attribute_of("fastsplit.tensors.outgoing", "share");
    PyObject *by_name = attribute_of("fastsplit.schema.dtypes", "BY_NAME");
    str_place = PyUnicode_InternFromString("place");
    str_is_neg = PyUnicode_InternFromString("is_neg");
    str_dtype = PyUnicode_InternFromString("dtype");
    str_metadata = PyUnicode_InternFromString("metadata");
    if (ndarray_type == NULL || outgoing_type == NULL || share_reference == NULL || by_name == NULL ||
        str_place == NULL || str_is_neg == NULL || str_dtype == NULL || str_metadata == NULL)
        return 0;
    for (int i = 0; i < DTYPES; i++) {
        PyObject *row = PyMapping_GetItemString(by_name, dtypes[i].name);
        PyObject *code = row == NULL ? NULL : PyObject_GetAttrString(row, "code");
        dtypes[i].code = code == NULL ? -1 : (int)PyLong_AsLong(code);
        Py_XDECREF(row);
        Py_XDECREF(code);
        if (PyErr_Occurred()) return 0;
    }
    Py_DECREF(by_name);
    return 1;
}

typedef struct {
    int code;
    PyObject *shape; /* a new tuple */
    uint64_t address, nbytes;
} Found;

static PyObject *tuple_of(const void *numbers, int count, size_t width) {
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++) {
        long long number = width == 8 ? (long long)((const int64_t *)numbers)[i] : ((const Py_ssize_t *)numbers)[i];
        PyObject *item = PyLong_FromLongLong(number);
        if (item == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

/* The functions below return 1 if the tensor was found, 0 if Python must look at it, -1 with an error. */

/* After a failure: Python looks at the tensor, unless it is an interrupt. */
static int failed(void) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return -1;
    PyErr_Clear();
    return 0;
}

static int find_numpy(PyObject *value, Found *found) {
    Py_buffer view;
    if (PyObject_GetBuffer(value, &view, PyBUF_FORMAT | PyBUF_STRIDES) < 0) return failed();
    char kind = 0;
    switch (view.format != NULL && view.format[0] != 0 && view.format[1] == 0 ? view.format[0] : 0) {
        case '?': kind = 'b'; break;
        case 'B': case 'H': case 'I': case 'L': case 'Q': kind = 'u'; break;
        case 'b': case 'h': case 'i': case 'l': case 'q': kind = 'i'; break;
        case 'e': case 'f': case 'd': kind = 'f'; break;
        default: break;
    }
    int known = kind != 0 && view.len > 0 && PyBuffer_IsContiguous(&view, 'C') &&
                (uintptr_t)view.buf % (size_t)view.itemsize == 0;
    found->code = 0;
    for (int i = 0; known && i < DTYPES; i++)
        if (dtypes[i].kind == kind && dtypes[i].bits == 8 * view.itemsize) found->code = dtypes[i].code;
    known = known && found->code != 0;
    found->address = (uint64_t)(uintptr_t)view.buf;
    found->nbytes = (uint64_t)view.len;
    found->shape = known ? tuple_of(view.shape, view.ndim, sizeof(Py_ssize_t)) : NULL;
    PyBuffer_Release(&view);
    if (!known) return 0;
    if (found->shape == NULL) return -1;
    PyObject *dtype = PyObject_GetAttr(value, str_dtype);
    PyObject *metadata = dtype == NULL ? NULL : PyObject_GetAttr(dtype, str_metadata);
    known = metadata == Py_None; /* else it may stand for a dtype that numpy does not have */
    Py_XDECREF(dtype);
    Py_XDECREF(metadata);
    if (known) return 1;
    Py_CLEAR(found->shape);
    return failed();
}

/* Looks whether a type is torch's, the first time that one may be. -1: interrupted. */
static int is_torch(PyTypeObject *type) {
    if (torch_type != NULL || strcmp(type->tp_name, "Tensor") != 0) return type == torch_type;
    PyObject *modules = PyImport_GetModuleDict(), *torch = PyDict_GetItemString(modules, "torch");
    PyObject *tensor = torch == NULL ? NULL : PyObject_GetAttrString(torch, "Tensor");
    PyObject *capsule = NULL;
    if (tensor == (PyObject *)type) capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    if (capsule != NULL && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        if (api != NULL && api->version.major == DL_MAJOR && api->dltensor_from_py_object_no_sync != NULL) {
            torch_api = api;
            torch_type = (PyTypeObject *)Py_NewRef(tensor);
        }
    }
    Py_XDECREF(capsule);
    Py_XDECREF(tensor);
    if (failed() < 0) return -1; /* a torch without it: Python makes do without */
    return type == torch_type;
}

static int find_torch(PyObject *value, Found *found) {
    DLTensor tensor;
    memset(&tensor, 0, sizeof(tensor));
    if (torch_api->dltensor_from_py_object_no_sync(value, &tensor) != 0) return failed();
    if (tensor.device_type != DL_CPU || tensor.lanes != 1 || tensor.data == NULL || tensor.ndim < 0 ||
        tensor.ndim > MAX_DIMS)
        return 0;
    uint64_t count = 1;
    int64_t dims[MAX_DIMS]; /* a copy: they are the tensor's own, and Python code runs below */
    for (int d = tensor.ndim - 1; d >= 0; d--) {
        if (tensor.shape[d] <= 0 || (tensor.strides != NULL && tensor.shape[d] != 1 && tensor.strides[d] != (int64_t)count) ||
            count > UINT64_MAX / 16 / (uint64_t)tensor.shape[d])
            return 0;
        count *= (uint64_t)tensor.shape[d];
        dims[d] = tensor.shape[d];
    }
    found->code = 0;
    for (int i = 0; i < DTYPES; i++)
        if (dtypes[i].dl_code == tensor.code && dtypes[i].bits == tensor.bits) found->code = dtypes[i].code;
    found->nbytes = count * (tensor.bits / 8u);
    found->address = (uint64_t)(uintptr_t)tensor.data + tensor.byte_offset;
    if (found->code == 0 || found->address % (tensor.bits / 8u)) return 0;
    PyObject *is_neg = PyObject_CallMethodNoArgs(value, str_is_neg); /* a flag on the same bytes */
    if (is_neg == NULL) return failed();
    Py_DECREF(is_neg);
    if (is_neg != Py_False) return 0;
    found->shape = tuple_of(dims, tensor.ndim, sizeof(int64_t));
    return found->shape == NULL ? -1 : 1;
}

/* Adds a tensor to what goes out. */
static int add(PyObject *value, PyObject *memory, PyObject *descs, PyObject *placements, uint64_t *nbytes) {
    Found found;
    PyTypeObject *type = Py_TYPE(value);
    int known = type == ndarray_type ? 1 : is_torch(type);
    if (known == 1) known = type == ndarray_type ? find_numpy(value, &found) : find_torch(value, &found);
    if (known <= 0) return known;
    PyObject *code = PyLong_FromLong(found.code), *desc = code == NULL ? NULL : PyTuple_Pack(2, code, found.shape);
    PyObject *address = PyLong_FromUnsignedLongLong(found.address), *size = PyLong_FromUnsignedLongLong(found.nbytes);
    PyObject *place = NULL;
    Py_XDECREF(code);
    Py_DECREF(found.shape);
    if (desc != NULL && address != NULL && size != NULL) {
        PyObject *args[3] = {memory, address, size};
        place = PyObject_VectorcallMethod(str_place, args, 3, NULL);
    }
    known = place == NULL ? -1 : PyTuple_CheckExact(place) && PyTuple_GET_SIZE(place) == 2;
    if (known == 1 &&
        (PyList_Append(descs, desc) < 0 || PyList_Append(placements, PyTuple_GET_ITEM(place, 0)) < 0 ||
         PyList_Append(placements, PyTuple_GET_ITEM(place, 1)) < 0 || PyList_Append(placements, size) < 0))
        known = -1;
    *nbytes += found.nbytes;
    Py_XDECREF(place);
    Py_XDECREF(desc);
    Py_XDECREF(address);
    Py_XDECREF(size);
    return known;
}

/* share(tensors, memory, deadline, limits) */
PyObject *native_share(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs) {
    PyObject *tensors = nargs == 3 || nargs == 4 ? args[0] : NULL, *descs = NULL, *placements = NULL, *kept = NULL, *out = NULL;
    int known = tensors != NULL && (PyTuple_CheckExact(tensors) || PyList_CheckExact(tensors));
    uint64_t nbytes = 0;
    if (known) {
        kept = PySequence_List(tensors);
        descs = PyList_New(0);
        placements = PyList_New(0);
        if (kept == NULL || descs == NULL || placements == NULL) known = -1;
        for (Py_ssize_t i = 0; known == 1 && i < PyList_GET_SIZE(kept); i++)
            known = add(PyList_GET_ITEM(kept, i), args[1], descs, placements, &nbytes);
    }
    if (known == 0) {
        out = PyObject_Vectorcall(share_reference, args, (size_t)nargs, NULL);
    } else if (known == 1) {
        PyObject *zero = PyLong_FromLong(0), *none = PyTuple_New(0), *total = PyLong_FromUnsignedLongLong(nbytes);
        if (zero != NULL && none != NULL && total != NULL) out = outgoing_type->tp_alloc(outgoing_type, 7);
        if (out != NULL) {
            PyObject *items[7] = {descs, none, zero, zero, placements, total, kept};
            for (int i = 0; i < 7; i++) PyTuple_SET_ITEM(out, i, Py_NewRef(items[i]));
        }
        Py_XDECREF(zero);
        Py_XDECREF(none);
        Py_XDECREF(total);
    }
    Py_XDECREF(descs);
    Py_XDECREF(placements);
    Py_XDECREF(kept);
    return out;
}
