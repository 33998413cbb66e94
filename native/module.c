/* fastsplit._native: steps of a call's path in C. What each does is written in Python, too, which is the reference;
 * fastsplit/wire/backend.py chooses between the two. */

#include "native.h"

PyObject *native_PeerLostError;
PyObject *native_pack_header_reference, *native_parse_header_reference;
PyObject *native_str_slot, *native_str_max_metadata_nbytes, *native_str_max_message_nbytes;

static int import_name(PyObject **into, const char *module, const char *name) {
    PyObject *found = PyImport_ImportModule(module);
    if (found == NULL) return 0;
    *into = PyObject_GetAttrString(found, name);
    Py_DECREF(found);
    return *into != NULL;
}

static int intern(PyObject **into, const char *text) { return (*into = PyUnicode_InternFromString(text)) != NULL; }

static int add_type(PyObject *module, PyType_Spec *spec, const char *name) {
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL) return 0;
    int added = PyModule_AddObjectRef(module, name, type);
    Py_DECREF(type);
    return added == 0;
}

static PyMethodDef functions[] = {
    {"pack_header", (PyCFunction)(void (*)(void))native_pack_header, METH_FASTCALL, "See fastsplit.schema.header."},
    {"parse_header", (PyCFunction)(void (*)(void))native_parse_header, METH_FASTCALL, "See fastsplit.schema.header."},
    {"share", (PyCFunction)(void (*)(void))native_share, METH_FASTCALL, "See fastsplit.tensors.outgoing."},
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
        !import_name(&native_pack_header_reference, "fastsplit.schema.header", "pack_header") ||
        !import_name(&native_parse_header_reference, "fastsplit.schema.header", "parse_header") ||
        !intern(&native_str_slot, "slot") || !intern(&native_str_max_metadata_nbytes, "max_metadata_nbytes") ||
        !intern(&native_str_max_message_nbytes, "max_message_nbytes") || !native_init_tensors())
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && !(add_type(module, &native_slots_spec, "Slots") &&
                            add_type(module, &native_templates_spec, "Templates") &&
                            add_type(module, &native_heads_spec, "Heads")))
        Py_CLEAR(module);
    return module;
}
