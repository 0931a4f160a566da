// A libnvrtc that compiles nothing: its images are the source behind a line that the stand-in driver reads.
#include "fake.h"

#include <dlfcn.h>
#include <vector>

#ifndef CUDA_MAJOR
#define CUDA_MAJOR 13
#endif
#define TEXT_OF(x) #x
#define BUILTINS(major) "libnvrtc-builtins.so." TEXT_OF(major) ".0"

namespace {

enum Result { SUCCESS = 0, INVALID_INPUT = 3, INVALID_OPTION = 5, COMPILATION = 6, BUILTINS_FAILED = 7, NO_IMAGE = 11 };

struct Program {
  std::string source, log, cubin, ptx;
};

constexpr int ARCHS[] = {75, 80, 86, 89, 90};

/// "sm_80" or "compute_80" of --gpu-architecture; 0 where there is none.
int architecture(const std::string& option, bool& real) {
  auto at = option.find("sm_"), virtual_at = option.find("compute_");
  real = at != std::string::npos;
  if (real) return atoi(option.c_str() + at + 3);
  return virtual_at == std::string::npos ? 0 : atoi(option.c_str() + virtual_at + 8);
}

bool replace(std::string& text, const std::string& what, const std::string& with) {
  auto at = text.find(what);
  if (at == std::string::npos) return false;
  text.replace(at, what.size(), with);
  return true;
}

}  // namespace

EXPORTED int nvrtcVersion(int* major, int* minor) {
  *major = CUDA_MAJOR, *minor = 0;
  return SUCCESS;
}
EXPORTED const char* nvrtcGetErrorString(int result) {
  return result == SUCCESS ? "NVRTC_SUCCESS" : result == COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR";
}
EXPORTED int nvrtcCreateProgram(Program** program, const char* source, const char*, int count,
                                const char* const* headers, const char* const* names) {
  *program = new Program{source, "", "", ""};
  for (int i = 0; i < count; i++) {
    replace((*program)->source, "#include \"" + std::string(names[i]) + "\"", headers[i]);
  }
  return SUCCESS;
}
EXPORTED int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  // As the real one does: by name, when it is first needed.
  if (!dlopen(BUILTINS(CUDA_MAJOR), RTLD_NOW)) {
    program->log = "nvrtc: error: failed to open " BUILTINS(CUDA_MAJOR) ".\n";
    return BUILTINS_FAILED;
  }
  int arch = 52;
  bool real = false;
  for (int i = 0; i < count; i++) {
    std::string option = options[i];
    if (option.rfind("--gpu-architecture", 0) == 0 || option.rfind("-arch", 0) == 0) arch = architecture(option, real);
  }
  bool known = false;
  for (int a : ARCHS) known |= a == arch;
  if (!known) {
    program->log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
    return INVALID_OPTION;
  }
  auto include = program->source.find("#include");
  if (getenv("FAKE_NVRTC_FAIL") || include != std::string::npos || program->source.find("KERNEL") == std::string::npos) {
    program->log = "program(1): catastrophic error: cannot open source file\n1 catastrophic error detected\n";
    return COMPILATION;
  }
  program->ptx = "FAKEPTX " + std::to_string(arch) + "\n" + program->source;
  if (real) program->cubin = "FAKECUBIN " + std::to_string(arch) + "\n" + program->source;
  fakeCudaCount("compilations", 1);
  return SUCCESS;
}

// Sizes count the closing zero, as NVRTC's do for PTX and logs; the images here need it too.
#define TEXT(name, field, missing)                                      \
  EXPORTED int nvrtcGet##name##Size(Program* program, size_t* bytes) {  \
    *bytes = program->field.size() + 1;                                 \
    return program->field.empty() ? missing : SUCCESS;                  \
  }                                                                     \
  EXPORTED int nvrtcGet##name(Program* program, char* to) {             \
    memcpy(to, program->field.c_str(), program->field.size() + 1);      \
    return program->field.empty() ? missing : SUCCESS;                  \
  }
TEXT(ProgramLog, log, SUCCESS)
TEXT(PTX, ptx, NO_IMAGE)
TEXT(CUBIN, cubin, NO_IMAGE)

EXPORTED int nvrtcDestroyProgram(Program** program) {
  delete *program;
  *program = nullptr;
  return SUCCESS;
}
EXPORTED int nvrtcGetNumSupportedArchs(int* count) {
  *count = std::size(ARCHS);
  return SUCCESS;
}
EXPORTED int nvrtcGetSupportedArchs(int* archs) {
  std::copy(std::begin(ARCHS), std::end(ARCHS), archs);
  return SUCCESS;
}
