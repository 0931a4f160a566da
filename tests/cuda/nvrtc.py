"""Compiles every kernel file as the program does at run time: NVRTC, no include path, the header's text in
place of its #include line. Usage: nvrtc.py LIBNVRTC; needs no GPU."""

import ctypes
import pathlib
import sys

ARCHITECTURES = ["sm_75", "sm_80", "sm_90"]
OPTIONS = ["--std=c++17", "--fmad=false"]


def compile_text(nvrtc, name, text, architecture):
    """The log of a failure; empty when it compiled to a cubin."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    options = [o.encode() for o in [*OPTIONS, f"--gpu-architecture={architecture}"]]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() if failed or size.value == 0 else ""


def main():
    library = pathlib.Path(sys.argv[1])
    # NVRTC looks for its other half by name alone.
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))
    kernels = pathlib.Path(__file__).resolve().parents[2] / "kernels"
    header = (kernels / "device.cuh").read_text()
    for file in sorted(kernels.glob("*.cu")):
        text = file.read_text().replace('#include "device.cuh"', header)
        for architecture in ARCHITECTURES:
            log = compile_text(nvrtc, file.name, text, architecture)
            if log:
                sys.exit(f"{file.name} for {architecture}:\n{log}")


main()
