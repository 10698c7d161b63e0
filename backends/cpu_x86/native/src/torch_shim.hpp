// The part of torch's stable C shim used here, resolved at run time: no torch header and no link to libtorch, so one
// build serves every torch release that has these symbols (torch/csrc/stable/c/shim.h, since torch 2.10).
#pragma once

#include <cstddef>
#include <cstdint>

namespace thal {

using Tensor = void*;   // AtenTensorHandle
using List = void*;     // StableListHandle
using String = void*;   // StringHandle
using Library = void*;  // TorchLibraryHandle
using Kernel = void (*)(uint64_t* stack, uint64_t inputs, uint64_t outputs);
using ParallelBody = void (*)(int64_t begin, int64_t end, void* ctx);

// X(field, return type, argument types, symbol). Functions returning int32_t give 0 for success unless they are getters.
#define THAL_TORCH_SYMBOLS(X)                                                                                         \
  X(new_fragment, int32_t, (const char*, const char*, uint32_t, Library*), aoti_torch_library_init_fragment)          \
  X(new_impl, int32_t, (const char*, const char*, const char*, uint32_t, Library*), aoti_torch_library_init_impl)     \
  X(define, int32_t, (Library, const char*), aoti_torch_library_def)                                                  \
  X(implement, int32_t, (Library, const char*, Kernel, uint64_t), torch_library_impl)                                 \
  X(dim, int32_t, (Tensor, int64_t*), aoti_torch_get_dim)                                                             \
  X(sizes, int32_t, (Tensor, int64_t**), aoti_torch_get_sizes)                                                        \
  X(strides, int32_t, (Tensor, int64_t**), aoti_torch_get_strides)                                                    \
  X(dtype, int32_t, (Tensor, int32_t*), aoti_torch_get_dtype)                                                         \
  X(device_type, int32_t, (Tensor, int32_t*), aoti_torch_get_device_type)                                             \
  X(data, int32_t, (Tensor, void**), aoti_torch_get_data_ptr)                                                         \
  X(empty, int32_t, (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*),                    \
    aoti_torch_empty_strided)                                                                                         \
  X(release, int32_t, (Tensor), aoti_torch_delete_tensor_object)                                                      \
  X(check, void, (bool, const char*, const char*, uint32_t, const char*), aoti_torch_check)                           \
  X(parallel_for, int32_t, (int64_t, int64_t, int64_t, ParallelBody, void*), torch_parallel_for)                      \
  X(num_threads, int32_t, (uint32_t*), torch_get_num_threads)                                                         \
  X(cpu, int32_t, (), aoti_torch_device_type_cpu)                                                                     \
  X(float32, int32_t, (), aoti_torch_dtype_float32)                                                                   \
  X(bfloat16, int32_t, (), aoti_torch_dtype_bfloat16)                                                                 \
  X(float16, int32_t, (), aoti_torch_dtype_float16)                                                                   \
  X(boolean, int32_t, (), aoti_torch_dtype_bool)                                                                      \
  X(float64, int32_t, (), aoti_torch_dtype_float64)                                                                   \
  X(int64, int32_t, (), aoti_torch_dtype_int64)                                                                       \
  X(int32, int32_t, (), aoti_torch_dtype_int32)                                                                       \
  X(int16, int32_t, (), aoti_torch_dtype_int16)                                                                       \
  X(int8, int32_t, (), aoti_torch_dtype_int8)                                                                         \
  X(uint8, int32_t, (), aoti_torch_dtype_uint8)                                                                       \
  X(float8_e4m3fn, int32_t, (), aoti_torch_dtype_float8_e4m3fn)                                                       \
  X(list_size, int32_t, (List, size_t*), torch_list_size)                                                             \
  X(list_item, int32_t, (List, size_t, uint64_t*), torch_list_get_item)                                               \
  X(new_list, int32_t, (size_t, List*), torch_new_list_reserve_size)                                                  \
  X(list_append, int32_t, (List, uint64_t), torch_list_push_back)                                                     \
  X(is_contiguous, int32_t, (Tensor, bool*), aoti_torch_is_contiguous)                                                \
  X(release_list, int32_t, (List), torch_delete_list)                                                                 \
  X(string_size, int32_t, (String, size_t*), torch_string_length)                                                     \
  X(string_text, int32_t, (String, const char**), torch_string_c_str)                                                 \
  X(release_string, int32_t, (String), torch_delete_string)

// torch::autograd::autogradNotImplementedFallback() and torch::Library::_impl, as GCC and Clang name them: the kernel
// with which torch's own operators refuse gradients and forward derivatives has no place in the stable shim. Both only
// pass a CppFunction on, whose layout is never looked at. And torch::autograd::impl::bump_version(at::Tensor const&), which
// says that a tensor was written to. They may be missing.
#define THAL_OPTIONAL_TORCH_SYMBOLS(X)                                                                                \
  X(refuse_gradients, void*, (void* function), _ZN5torch8autograd30autogradNotImplementedFallbackEv)                  \
  X(implement_function, void*, (Library, const char*, void* function, int32_t),                                       \
    _ZNR5torch7Library5_implEPKcONS_11CppFunctionENS_17_RegisterOrVerifyE)                                            \
  X(bump_version, void, (Tensor), _ZN5torch8autograd4impl12bump_versionERKN2at6TensorE)

struct TorchShim {
#define THAL_FIELD(field, result, arguments, symbol) result(*field) arguments;
  THAL_TORCH_SYMBOLS(THAL_FIELD)
  THAL_OPTIONAL_TORCH_SYMBOLS(THAL_FIELD)
#undef THAL_FIELD
};

extern TorchShim torch;

// Whether this process is a forked child: OpenMP's threads do not survive a fork, and a child of a process that has used
// them hangs in its first parallel region, in torch's own kernels too. So a forked child computes on its one thread.
bool is_forked();

// The boxed kernels of flex_attention, differentiable_attention and attention_backward.
void flex_attention_kernel(uint64_t* stack, uint64_t, uint64_t);
void differentiable_attention_kernel(uint64_t* stack, uint64_t, uint64_t);
void attention_backward_kernel(uint64_t* stack, uint64_t, uint64_t);
// That of foreach, and what serves it for tensors that are not plain memory.
void foreach_kernel(uint64_t* stack, uint64_t, uint64_t);
void foreach_declined(uint64_t* stack, uint64_t, uint64_t);
// That of products, and what serves it likewise.
void products_kernel(uint64_t* stack, uint64_t, uint64_t);
void products_declined(uint64_t* stack, uint64_t, uint64_t);

}  // namespace thal
