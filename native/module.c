/* fastsplit._native: steps of a call's path in C. What each does is written in Python, too, which is the reference;
 * fastsplit/wire/backend.py chooses between the two. */

#include "native.h"

PyObject *native_PeerLostError;
PyObject *native_str_slot;

static int import_name(PyObject **into, const char *module, const char *name) {
    PyObject *found = PyImport_ImportModule(module);
    if (found == NULL) return 0;
    *into = PyObject_GetAttrString(found, name);
    Py_DECREF(found);
    return *into != NULL;
}

static int add_type(PyObject *module, PyType_Spec *spec, const char *name) {
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL) return 0;
    int added = PyModule_AddObjectRef(module, name, type);
    Py_DECREF(type);
    return added == 0;
}

static PyObject *knows_torch(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored)) {
    int known = native_knows_torch();
    return known < 0 ? NULL : PyBool_FromLong(known);
}

static PyMethodDef functions[] = {
    {"lease", native_lease, METH_VARARGS, "See fastsplit.wire.shm.arena."},
    {"knows_torch", knows_torch, METH_NOARGS, "See fastsplit.wire.backend."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fastsplit._native",
    .m_doc = "Compiled steps of a call's path; see fastsplit.wire.backend.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__native(void) {
    if (!import_name(&native_PeerLostError, "fastsplit.errors", "PeerLostError") ||
        !native_intern(&native_str_slot, "slot") || !native_init_tensors() || !native_init_fastpath())
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL &&
        !(add_type(module, &native_slots_spec, "Slots") && add_type(module, &native_templates_spec, "Templates") &&
          add_type(module, &native_heads_spec, "Heads") && add_type(module, &native_fastpath_spec, "FastPath") &&
          PyModule_AddIntConstant(module, "REVISION", NATIVE_REVISION) == 0))
        Py_CLEAR(module);
    return module;
}
