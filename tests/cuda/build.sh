#!/usr/bin/env bash
# Builds the stand-in CUDA libraries, or the runner of single kernels, with g++ alone:
#   tests/cuda/build.sh DIR          a directory of libraries for each VARIANT
#   tests/cuda/build.sh DIR runner   DIR/runner: with address and undefined-behaviour sanitizers
# Objects are kept in DIR/objects and made again only when a source is newer. Needs x86-64 with AVX2, FMA and F16C.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="${1:?usage: build.sh DIR}"
what="${2:-libraries}"
mkdir -p "$out/$what-objects"
out="$(cd "$out" && pwd)"
objects="$out/$what-objects"
CXX="${CXX:-g++}"
FLAGS=(-std=c++17 -O2 -g1 -march=native -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -fno-strict-aliasing -I"$here")

# Kernels stop at an access that is not aligned to its type, as a GPU does.
KERNEL_FLAGS=(-fsanitize=alignment -fsanitize-undefined-trap-on-error)
if [ "$what" = runner ]; then
  FLAGS+=(-fsanitize=address,undefined -fno-sanitize-recover=all)
  KERNEL_FLAGS=()
fi

exec 9>"$objects/lock"
flock 9

fresh() { # TARGET: newer than every source
  [ -e "$1" ] && [ -z "$(find "$here" "$here/../../kernels" -newer "$1" \( -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name build.sh \) -print -quit)" ]
}

compile() { # OBJECT SOURCE [FLAG...]
  local object="$objects/$1.o" source="$2"
  shift 2
  fresh "$object" || "$CXX" "${FLAGS[@]}" "$@" -c "$source" -o "$object"
}

compile_kernels() { # FILE...
  local file
  for file in "$@"; do
    compile "kernels_$file" "$here/units/$file.cpp" "${KERNEL_FLAGS[@]}" "-DSIGNATURE=\"$(head -n 1 "$here/../../kernels/$file.cu" | sed 's/["\\]//g')\""
  done
}

# What an earlier tree's units left would be linked.
for object in "$objects"/kernels_*.o; do
  unit="$(basename "$object" .o)"
  [ -e "$here/units/${unit#kernels_}.cpp" ] || rm -f "$object"
done

cd "$out"
(compile_kernels gemm_small rows norm) & first=$!
(compile_kernels prefill append epilogue) & second=$!
wait "$first"
(compile_kernels decode tables $(cd "$here/units" && ls prefill_*.cpp 2>/dev/null | sed 's/\.cpp//')) & first=$!
units=(emulator registry fake_driver fake_queue fake_stream fake_memory fake_cublas fake_nvrtc fake_nvml)
[ "$what" = runner ] && units=(emulator registry runner)
for unit in "${units[@]}"; do
  compile "$unit" "$here/$unit.cpp"
done
if [ "$what" = libraries ]; then
  compile driver_no_register "$here/fake_driver.cpp" -DWITHOUT_HOST_REGISTER
  compile cublas_no_gemm_ex "$here/fake_cublas.cpp" -DWITHOUT_GEMM_EX
  compile nvrtc_12 "$here/fake_nvrtc.cpp" -DCUDA_MAJOR=12
  compile cublas_12 "$here/fake_cublas.cpp" -DCUDA_MAJOR=12
fi
wait "$first"
wait "$second"

# DIRECTORY LIBRARY VERSION OBJECT... : LIBRARY.so.VERSION. What it needs is found by the loader or is there already,
# as with the real ones: it names no directory.
link() {
  local dir="$out/$1" name="$2" version="$3" needs=()
  shift 3
  mkdir -p "$dir"
  [ "$name" = libcuda ] || needs=(-L"$dir" -l:libcuda.so.1)
  [ "$name" = libcublas ] && needs+=(-Wl,--no-as-needed -l:"libcublasLt.so.$version")
  "$CXX" -shared -o "$dir/$name.so.$version" -Wl,-soname,"$name.so.$version" "${@/%/.o}" "${needs[@]}" -lpthread
}

toolkit() { # DIRECTORY MAJOR CUBLAS NVRTC: the libraries of one CUDA; nothing for what is -
  link "$1" libcublasLt "$2"
  link "$1" libnvrtc-builtins "$2.0"
  [ "$3" = - ] || link "$1" libcublas "$2" "$3"
  [ "$4" = - ] || link "$1" libnvrtc "$2" "$4"
}

cd "$objects"
kernels=(kernels_*.o)
if [ "$what" = runner ]; then
  "$CXX" -fsanitize=address,undefined -o "$out/runner" emulator.o registry.o runner.o "${kernels[@]}" -lpthread
  exit
fi
# VARIANT DRIVER CUBLAS NVRTC
while read -r variant driver cublas nvrtc; do
  link "$variant" libcuda 1 "$driver" fake_queue fake_stream fake_memory emulator registry "${kernels[@]%.o}"
  # Nothing but the driver: no management library either.
  [ "$variant" = driver-alone ] && continue
  link "$variant" libnvidia-ml 1 fake_nvml
  major=13
  [ "$variant" = cuda-12 ] && major=12
  toolkit "$variant" "$major" "$cublas" "$nvrtc"
done <<END
default fake_driver fake_cublas fake_nvrtc
driver-alone fake_driver - -
cuda-12 fake_driver cublas_12 nvrtc_12
new-cublas fake_driver fake_cublas nvrtc_12
no-cublas fake_driver - fake_nvrtc
no-nvrtc fake_driver fake_cublas -
no-gemm-ex fake_driver cublas_no_gemm_ex fake_nvrtc
no-host-register driver_no_register fake_cublas fake_nvrtc
END
