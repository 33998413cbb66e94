/* Tensors: what is to be known of one that goes out (fastsplit/tensors/outgoing.py and checks.py), and views of memory
 * that came in (arrays.py, and Lease of pool.py); read these first.
 *
 * Rules. Taken here are numpy's exact ndarray and torch's exact Tensor: row-major, of a plain dtype, not empty. At
 * anything else Python looks: nothing has happened yet.
 */

#include "native.h"

#include <stdlib.h>
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

typedef struct ManagedTensor {
    DLPackVersion version;
    void *context;
    void (*deleter)(struct ManagedTensor *self);
    uint64_t flags;
    DLTensor tensor;
} ManagedTensor;

typedef struct {
    DLPackVersion version;
    void *prev_api;
    int (*managed_tensor_allocator)(void);
    int (*managed_tensor_from_py_object_no_sync)(void);
    int (*managed_tensor_to_py_object_no_sync)(ManagedTensor *tensor, void **out); /* takes it over */
    int (*dltensor_from_py_object_no_sync)(void *py_object, DLTensor *out);        /* may be NULL */
} DLPackExchangeAPI;

enum { ALIGNMENT = 64 }; /* of fastsplit/tensors/pool.py */
enum { DL_CPU = 1, DL_MAJOR = 1, DL_MINOR = 1 };

typedef struct {
    const char *name;      /* of fastsplit/schema/dtypes.py */
    uint8_t dl_code, bits; /* DLPack's */
    char kind;             /* of a buffer's format: signed, unsigned, float, boolean; 0: numpy has no such dtype */
    int code;              /* ours */
} DType;

static DType dtypes[] = {
    {"bool", 6, 8, 'b', 0},     {"uint8", 1, 8, 'u', 0},        {"int8", 0, 8, 'i', 0},
    {"uint16", 1, 16, 'u', 0},  {"int16", 0, 16, 'i', 0},       {"uint32", 1, 32, 'u', 0},
    {"int32", 0, 32, 'i', 0},   {"uint64", 1, 64, 'u', 0},      {"int64", 0, 64, 'i', 0},
    {"float16", 2, 16, 'f', 0}, {"bfloat16", 4, 16, 0, 0},      {"float32", 2, 32, 'f', 0},
    {"float64", 2, 64, 'f', 0}, {"float8_e4m3fn", 10, 8, 0, 0}, {"float8_e5m2", 12, 8, 0, 0},
};

enum { DTYPES = sizeof(dtypes) / sizeof(dtypes[0]) };

static PyTypeObject *ndarray_type, *lease_type;
static PyTypeObject *torch_type; /* NULL until a torch tensor was sent */
static const DLPackExchangeAPI *torch_api;
static PyObject *str_is_neg, *str_dtype, *str_metadata, *str_address, *str_append, *str_code, *str_numpy, *str_base;

static PyObject *attribute_of(const char *module, const char *name) {
    PyObject *imported = PyImport_ImportModule(module);
    if (imported == NULL) return NULL;
    PyObject *found = PyObject_GetAttrString(imported, name);
    Py_DECREF(imported);
    return found;
}

int native_init_tensors(void) {
    ndarray_type = (PyTypeObject *)attribute_of("numpy", "ndarray");
    PyObject *by_name = attribute_of("fastsplit.schema.dtypes", "BY_NAME");
    lease_type = (PyTypeObject *)PyType_FromSpec(&native_lease_spec);
    if (ndarray_type == NULL || by_name == NULL || lease_type == NULL || !native_intern(&str_is_neg, "is_neg") ||
        !native_intern(&str_dtype, "dtype") || !native_intern(&str_metadata, "metadata") ||
        !native_intern(&str_address, "address") || !native_intern(&str_append, "append") ||
        !native_intern(&str_code, "code") || !native_intern(&str_numpy, "numpy") || !native_intern(&str_base, "base"))
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
        case 'B':
        case 'H':
        case 'I':
        case 'L':
        case 'Q': kind = 'u'; break;
        case 'b':
        case 'h':
        case 'i':
        case 'l':
        case 'q': kind = 'i'; break;
        case 'e':
        case 'f':
        case 'd': kind = 'f'; break;
        default: break;
    }
    int known = kind != 0 && view.len > 0 && PyBuffer_IsContiguous(&view, 'C') &&
                (uintptr_t)view.buf % (size_t)view.itemsize == 0;
    found->code = 0;
    for (int i = 0; known && i < DTYPES; i++)
        if (dtypes[i].kind == kind && dtypes[i].bits == 8 * view.itemsize) found->code = dtypes[i].code;
    known = known && found->code != 0;
    known = known && view.ndim <= MAX_DIMS;
    found->address = (uint64_t)(uintptr_t)view.buf;
    found->nbytes = (uint64_t)view.len;
    found->ndim = view.ndim;
    for (int d = 0; known && d < view.ndim; d++) found->dims[d] = view.shape[d];
    PyBuffer_Release(&view);
    if (!known) return 0;
    PyObject *dtype = PyObject_GetAttr(value, str_dtype);
    PyObject *metadata = dtype == NULL ? NULL : PyObject_GetAttr(dtype, str_metadata);
    known = metadata == Py_None; /* else it may stand for a dtype that numpy does not have */
    Py_XDECREF(dtype);
    Py_XDECREF(metadata);
    return known ? 1 : failed();
}

int native_owns_memory(PyObject *tensor) {
    PyObject *base = Py_TYPE(tensor) == ndarray_type ? PyObject_GetAttr(tensor, str_base) : NULL;
    int owns = base != NULL && (base == Py_None || Py_TYPE(base) == lease_type);
    if (base == NULL) PyErr_Clear();
    Py_XDECREF(base);
    return owns;
}

int native_knows_torch(void) {
    PyObject *torch = PyDict_GetItemString(PyImport_GetModuleDict(), "torch"), *capsule = NULL;
    PyObject *tensor = torch_type != NULL || torch == NULL ? NULL : PyObject_GetAttrString(torch, "Tensor");
    if (tensor != NULL) capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
    if (capsule != NULL && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        if (api != NULL && api->version.major == DL_MAJOR && api->dltensor_from_py_object_no_sync != NULL &&
            api->managed_tensor_to_py_object_no_sync != NULL) {
            torch_api = api;
            torch_type = (PyTypeObject *)Py_NewRef(tensor);
        }
    }
    Py_XDECREF(capsule);
    Py_XDECREF(tensor);
    if (failed() < 0) return -1; /* a torch without it: Python makes do without */
    return torch_type != NULL;
}

static int find_torch(PyObject *value, Found *found) {
    DLTensor tensor;
    memset(&tensor, 0, sizeof(tensor));
    if (torch_api->dltensor_from_py_object_no_sync(value, &tensor) != 0) return failed();
    if (tensor.device_type != DL_CPU || tensor.lanes != 1 || tensor.data == NULL || tensor.ndim < 0 ||
        tensor.ndim > MAX_DIMS)
        return 0;
    uint64_t count = 1;
    found->ndim = tensor.ndim;
    for (int d = tensor.ndim - 1; d >= 0; d--) {
        if (tensor.shape[d] <= 0 ||
            (tensor.strides != NULL && tensor.shape[d] != 1 && tensor.strides[d] != (int64_t)count) ||
            count > UINT64_MAX / 16 / (uint64_t)tensor.shape[d])
            return 0;
        count *= (uint64_t)tensor.shape[d];
        found->dims[d] = tensor.shape[d]; /* a copy: they are the tensor's own, and Python code runs below */
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
    return is_neg == Py_False;
}

int native_find(PyObject *value, Found *found) {
    PyTypeObject *type = Py_TYPE(value);
    if (type == ndarray_type) return find_numpy(value, found);
    if (torch_type == NULL && strcmp(type->tp_name, "Tensor") == 0 && native_knows_torch() < 0) return -1;
    return type == torch_type ? find_torch(value, found) : 0;
}

/* ---- tensors that came in by reference ---- */

Lease *native_make_lease(PyObject *segment, uint64_t offset, Py_ssize_t nbytes) {
    PyObject *start = PyObject_GetAttr(segment, str_address);
    uint64_t address = start == NULL ? 0 : PyLong_AsUnsignedLongLong(start);
    Py_XDECREF(start);
    Lease *lease = PyErr_Occurred() ? NULL : (Lease *)lease_type->tp_alloc(lease_type, 0);
    if (lease == NULL) return NULL;
    lease->segment = Py_NewRef(segment);
    lease->address = (void *)(uintptr_t)(address + offset);
    lease->nbytes = nbytes;
    return lease;
}

Lease *native_make_private(size_t nbytes) {
    void *memory = NULL;
    Lease *lease = posix_memalign(&memory, ALIGNMENT, nbytes) ? NULL : (Lease *)lease_type->tp_alloc(lease_type, 0);
    if (lease == NULL) {
        free(memory);
        return PyErr_Occurred() ? NULL : (Lease *)PyErr_NoMemory();
    }
    lease->address = memory;
    lease->nbytes = (Py_ssize_t)nbytes;
    return lease;
}

/* lease(segment, offset, nbytes, token, home): a lease that is in force */
PyObject *native_lease(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *segment, *token, *home;
    unsigned long long offset;
    Py_ssize_t nbytes;
    if (!PyArg_ParseTuple(args, "OKnOO", &segment, &offset, &nbytes, &token, &home)) return NULL;
    Lease *lease = native_make_lease(segment, offset, nbytes);
    if (lease == NULL) return NULL;
    lease->token = Py_NewRef(token);
    lease->home = Py_NewRef(home);
    return (PyObject *)lease;
}

static void Lease_dealloc(Lease *self) {
    if (self->home != NULL) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        PyObject *done = PyObject_CallMethodOneArg(self->home, str_append, self->token);
        if (done == NULL) PyErr_WriteUnraisable(self->home);
        Py_XDECREF(done);
        PyErr_Restore(type, value, trace);
    }
    if (self->segment == NULL) free(self->address);
    Py_XDECREF(self->home);
    Py_XDECREF(self->token);
    Py_XDECREF(self->segment);
    native_free(self);
}

static int Lease_getbuffer(Lease *self, Py_buffer *view, int flags) {
    return PyBuffer_FillInfo(view, (PyObject *)self, self->address, self->nbytes, 0, flags);
}

static PyType_Slot Lease_slots[] = {
    {Py_tp_doc, "The right to use a part of shared memory; see fastsplit.tensors.pool.Lease."},
    {Py_tp_dealloc, Lease_dealloc},
    {Py_bf_getbuffer, Lease_getbuffer},
    {0, NULL},
};

PyType_Spec native_lease_spec = {
    .name = "fastsplit._native.Lease",
    .basicsize = sizeof(Lease),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Lease_slots,
};

/* The row of `dtypes`; NULL for one that Python must look at, or with an error. */
static const DType *dtype_of(PyObject *desc) {
    PyObject *code = PyObject_GetAttr(PyTuple_GET_ITEM(desc, 0), str_code);
    long number = code == NULL ? -1 : PyLong_AsLong(code);
    Py_XDECREF(code);
    for (int i = 0; i < DTYPES; i++)
        if (dtypes[i].code == number) return &dtypes[i];
    return NULL;
}

int native_can_view(PyObject *desc, uint64_t offset) {
    const DType *dtype = dtype_of(desc);
    return dtype != NULL && offset % (dtype->bits / 8u) == 0 && PyTuple_GET_SIZE(PyTuple_GET_ITEM(desc, 1)) <= MAX_DIMS;
}

static void delete_managed(ManagedTensor *managed) {
    if (Py_IsInitialized()) { /* else the process ends */
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF((PyObject *)managed->context);
        PyGILState_Release(state);
    }
    PyMem_RawFree(managed);
}

static PyObject *view_torch(Lease *lease, PyObject *desc) {
    const DType *dtype = dtype_of(desc);
    PyObject *shape = PyTuple_GET_ITEM(desc, 1);
    int ndim = (int)PyTuple_GET_SIZE(shape);
    ManagedTensor *managed = PyMem_RawCalloc(1, sizeof(ManagedTensor) + 2 * sizeof(int64_t) * (size_t)ndim);
    if (managed == NULL) return PyErr_NoMemory();
    int64_t *dims = (int64_t *)(managed + 1), *strides = dims + ndim, stride = 1;
    for (int d = ndim - 1; d >= 0; d--) {
        dims[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
        strides[d] = stride;
        stride *= dims[d];
    }
    managed->version = (DLPackVersion){DL_MAJOR, DL_MINOR};
    managed->context = Py_NewRef((PyObject *)lease);
    managed->deleter = delete_managed;
    managed->tensor = (DLTensor){lease->address, DL_CPU, 0, ndim, dtype->dl_code, dtype->bits, 1, dims, strides, 0};
    void *tensor = NULL;
    return torch_api->managed_tensor_to_py_object_no_sync(managed, &tensor) == 0 ? tensor : NULL;
}

PyObject *native_view(Lease *lease, PyObject *desc, int as_torch) {
    if (as_torch) return view_torch(lease, desc);
    PyObject *dtype = PyObject_GetAttr(PyTuple_GET_ITEM(desc, 0), str_numpy);
    PyObject *args[3] = {PyTuple_GET_ITEM(desc, 1), dtype, (PyObject *)lease};
    PyObject *array = dtype == NULL ? NULL : PyObject_Vectorcall((PyObject *)ndarray_type, args, 3, NULL);
    Py_XDECREF(dtype);
    return array;
}
