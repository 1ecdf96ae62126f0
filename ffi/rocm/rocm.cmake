# The ROCm handlers, which need no ROCm to build, and our own kernels, which need a clang with an AMDGPU target and lld.
jax_dsv4_library(libdsv4_rocm
  rocm/aiter.cc
  rocm/code_object.cc
  rocm/handlers.cc
  rocm/hip.cc
  rocm/launch.cc)
target_compile_options(libdsv4_rocm PRIVATE -Wall -Wextra)
target_link_libraries(libdsv4_rocm PRIVATE ${CMAKE_DL_LIBS})

find_program(JAX_DSV4_AMDGPU_CLANG
  NAMES amdclang++ clang++-22 clang++-21 clang++-20 clang++
  HINTS $ENV{ROCM_PATH}/llvm/bin /opt/rocm/llvm/bin
  DOC "A clang++ that compiles HIP for gfx942 and gfx950")
set(amdgpu_flags -x hip --cuda-device-only --no-gpu-bundle-output -nogpuinc -nogpulib -std=c++17 -O3)
set(amdgpu_source "${CMAKE_CURRENT_SOURCE_DIR}/rocm/kernels.hip")
foreach(architecture gfx942 gfx950)
  set(code_object "${CMAKE_CURRENT_BINARY_DIR}/dsv4_${architecture}.co")
  set(compile "${JAX_DSV4_AMDGPU_CLANG}" ${amdgpu_flags} --offload-arch=${architecture} "-I${CMAKE_CURRENT_SOURCE_DIR}"
      "${amdgpu_source}" -o "${code_object}")
  # Compiled when configuring: whether a clang can is known only by trying, and where none can the rest is built without them.
  if(JAX_DSV4_AMDGPU_CLANG)
    execute_process(COMMAND ${compile} RESULT_VARIABLE failed ERROR_VARIABLE complaint)
    if(failed)
      message(STATUS "${JAX_DSV4_AMDGPU_CLANG} cannot compile for ${architecture}: ${complaint}")
    else()
      install(FILES "${code_object}" DESTINATION jax_dsv4)
    endif()
  endif()
endforeach()
if(NOT JAX_DSV4_AMDGPU_CLANG)
  message(STATUS "No clang++ found: the AMD kernels are left out")
endif()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${amdgpu_source}" common/fp8.h common/plan.h common/params.h rocm/params.h)
