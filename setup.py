"""The compiled core, which setup.cfg cannot describe. It is optional: without a compiler the rest is installed."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "fastsplit._native",
            sources=[
                "native/fastpath.c",
                "native/frames.c",
                "native/header.c",
                "native/heads.c",
                "native/module.c",
                "native/slots.c",
                "native/templates.c",
                "native/tensors.c",
            ],
            depends=["native/fastpath.h", "native/native.h"],
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra"],
            optional=True,
        )
    ]
)
