"""The compiled core, which setup.cfg cannot describe. It is optional: without a compiler the rest is installed."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "fastsplit._native",
            sources=[
                "native/header.c",
                "native/heads.c",
                "native/fastpath.c",
                "native/module.c",
                "native/slots.c",
                "native/templates.c",
                "native/tensors.c",
            ],
            depends=["native/native.h"],
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra"],
            optional=True,
        )
    ]
)
