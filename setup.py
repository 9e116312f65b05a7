"""Build the native engine where there is a compiler (setup.cfg describes everything else)."""

from glob import glob

from setuptools import Extension, setup

KERNELS = "snnconv/engine/kernels"

setup(
    ext_modules=[
        Extension(
            "snnconv.engine.kernels._kernels",
            sorted(glob(f"{KERNELS}/*.cpp")),
            depends=sorted(glob(f"{KERNELS}/*.h") + glob(f"{KERNELS}/*.inl")),
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,  # snnconv works without, slower
        )
    ]
)
