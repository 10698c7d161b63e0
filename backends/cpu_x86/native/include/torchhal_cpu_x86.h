/* Plain C interface of the torchhal-cpu-x86 native library.
 *
 * Nothing here throws, aborts, allocates (except where said) or starts a thread: memory and threads come from the
 * caller. All strides are in elements and may be any value, including 0 for broadcast dimensions. */
#ifndef TORCHHAL_CPU_X86_H
#define TORCHHAL_CPU_X86_H

#include <stdint.h>

#if defined(_WIN32)
#define THAL_API __declspec(dllexport)
#else
#define THAL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct below or the meaning of a function changes. */
#define THAL_INTERFACE_VERSION 6

enum { THAL_F32 = 0, THAL_BF16 = 1, THAL_F16 = 2, THAL_F64 = 3, THAL_DTYPES = 4 };
/* Of quantised keys and values: signed bytes, and float8_e4m3fn (8 bits, 4 of exponent, no infinities). */
enum { THAL_I8 = 4, THAL_F8 = 5, THAL_STORED_TYPES = 6 };

/* AUTO takes the set chosen by thal_set_isa for the dtype (at first the widest one this CPU has). */
enum {
  THAL_ISA_AUTO = 0,
  THAL_ISA_AVX2 = 1,
  THAL_ISA_AVX512 = 2,
  THAL_ISA_AVX512_BF16 = 3,
  THAL_ISA_AMX_BF16 = 4,
  THAL_ISAS = 5
};

/* BOOL: one byte per element, non-zero = attend. The others are added to the scaled score; -inf means masked. */
enum { THAL_MASK_NONE = 0, THAL_MASK_BOOL = 1, THAL_MASK_F32 = 2, THAL_MASK_BF16 = 3, THAL_MASK_F16 = 4, THAL_MASK_F64 = 5 };

enum {
  THAL_OK = 0,
  THAL_BAD_STRUCT = 1,    /* struct_size is not what this library was built with */
  THAL_BAD_DTYPE = 2,     /* or quantised keys without pages */
  THAL_BAD_ISA = 3,       /* unknown, or not supported by this CPU or operating system */
  THAL_BAD_SIZE = 4,      /* negative size, E < 1, or Hq not a multiple of Hkv */
  THAL_BAD_POINTER = 5,   /* a needed pointer is null */
  THAL_BAD_WORKSPACE = 6, /* smaller than thal_attention_workspace asks for */
  THAL_BAD_THREADS = 7,   /* num_threads < 1, or > 1 without a parallel callback */
  THAL_PARALLEL_FAILED = 8,
  THAL_NO_MEMORY = 9,     /* programs, and the measuring functions, allocate */
  THAL_BAD_PROGRAM = 10,  /* words that are no program, or operands that do not fit it */
  THAL_BAD_LENGTHS = 11,  /* cumulative or key lengths that contradict the shapes */
  THAL_BAD_PAGES = 12,    /* a used entry of the page table names no page */
  THAL_BAD_BLOCKS = 13    /* block lists that do not cover the call */
};

/* Calls task(i, ctx) once for every i in [0, n), from any threads, and returns 0 after the last has ended. */
typedef void (*thal_task)(int64_t i, void* ctx);
typedef int (*thal_parallel)(int64_t n, thal_task task, void* ctx, void* user);

/* Programs: captured pointwise functions for the vector machine; program.hpp says how the words are laid out. */
THAL_API int32_t thal_primitive_count(void);
THAL_API const char* thal_primitive_name(int32_t code);

typedef struct thal_captured {
  const void* data;
  int32_t type; /* place in torchhal.pointwise.dtypes.DTYPES */
  int32_t dims; /* at most 16 */
  const int64_t *sizes, *strides;
} thal_captured;

/* A captured function: score_mod(score, b, h, q_idx, kv_idx) or mask_mod(b, h, q_idx, kv_idx), int32 and, for the score,
 * float32 or in float64 calls float64. */
typedef struct thal_function {
  const int64_t* words;
  int64_t count;
  const thal_captured* captured;
  int64_t captured_count;
} thal_function;

/* A BlockMask: for each (mask batch, mask head, block of query rows) the key blocks that are partly visible, where
 * mask_mod decides, and those that are wholly visible. Entries outside [0, key blocks) mean nothing. */
typedef struct thal_blocks {
  const int32_t *num, *indices;           /* (Bm, Hm, rows), (Bm, Hm, rows, most) */
  const int32_t *full_num, *full_indices; /* null: none */
  int64_t num_stride[3], indices_stride[4], full_num_stride[3], full_indices_stride[4];
  int64_t batches, heads, rows, most, full_most;
  int64_t block_rows, block_keys;
} thal_blocks;

/* Sequences of lengths of their own. Cumulative lengths: q (T, Hq, E), k and v (Tk, Hkv, E|Ev), out and lse as q; the
 * first stride of each is not used. Pages: k and v (pages, Hkv, page_size, E|Ev); query row i of a sequence stands at
 * position lengths[b] - L + i. */
typedef struct thal_ragged {
  const int32_t *starts_q, *starts_k;   /* (B + 1,), or null */
  int64_t tokens_q, tokens_k;
  const int32_t *page_table, *lengths;  /* (B, columns), (B,), or null */
  int64_t page_table_stride[2], columns, pages, page_size;
} thal_ragged;

/* Keys and values in pages whose elements are stored numbers times a scale of their head, or of their token and head. */
typedef struct thal_quantized {
  int32_t type; /* of k and v: THAL_I8 or THAL_F8 */
  int32_t reserved;
  const float *key_scale, *value_scale;
  int64_t key_stride[3], value_stride[3]; /* (pages, Hkv, page_size); 0 where one scale serves all */
} thal_quantized;

/* The weight of a pair is dropped where its 32-bit word of Philox4x32-10 is below `threshold`, p * 2^32; those that stay
 * are divided by 1 - p. reference/dropout.py has the counters. */
typedef struct thal_dropout {
  uint64_t seed;
  uint64_t threshold; /* up to 2^32 */
  double kept;        /* 1 / (1 - p), and 1 for p = 1 */
} thal_dropout;

typedef struct thal_attention {
  uint32_t struct_size; /* sizeof(thal_attention) */
  int32_t dtype;        /* of q, k, v and out, of k and v unless quantized; float64 is computed in float64, all else in float32 */
  int32_t isa;
  int32_t is_causal; /* key j is visible to query i iff j <= i (top-left aligned) */
  int32_t mask_kind;
  int32_t num_threads;
  double scale;
  int64_t B, Hq, Hkv, L, S, E, Ev; /* B, L, S, Ev and both numbers of heads may be 0 */
  const void *q, *k, *v, *mask;
  void* out;
  void* lse;            /* optional: natural logarithm of the sum, (B, Hq, L), float32 or for THAL_F64 float64; -inf for fully masked rows */
  int64_t q_stride[4];  /* (B, Hq, L, E) */
  int64_t k_stride[4];  /* (B, Hkv, S, E) */
  int64_t v_stride[4];  /* (B, Hkv, S, Ev) */
  int64_t mask_stride[4]; /* (B, Hq, L, S) */
  int64_t out_stride[4]; /* (B, Hq, L, Ev) */
  int64_t lse_stride[3];
  const thal_function *score_mod, *mask_mod; /* null: none */
  const thal_blocks* blocks;                 /* null: none */
  const thal_dropout* dropout;               /* null: none */
  const thal_ragged* ragged;                 /* null: every sequence has L rows and S keys */
  const thal_quantized* quantized;           /* null: k and v are of dtype; else ragged has pages */
  void* workspace; /* any alignment */
  int64_t workspace_size;
  thal_parallel parallel; /* may be null when num_threads == 1 */
  void* parallel_user;
  void* max_scores; /* optional: the largest score of each row, -inf for fully masked rows; type and strides of lse */
} thal_attention;

/* What the gradient of a score_mod adds to the gradient of a tensor it captures, for every pair of query and key. */
typedef struct thal_contribution {
  int32_t captured; /* which of the score_mod's */
  int32_t index;    /* first of the results that are the indices, one for each dimension */
  int32_t value;    /* result that is added there */
  int32_t reserved;
  int64_t offset;   /* where the tensor's gradient begins in `sums`, contiguous */
} thal_contribution;

/* Gradients of a call, of which `out` and `lse` are given now: they are the forward pass's. A tensor shaped like one of
 * the call has strides of its own, of which the first is not used for packed sequences. */
typedef struct thal_gradients {
  uint32_t struct_size; /* sizeof(thal_gradients) */
  int32_t contribution_count;
  const void* grad_out;  /* of the call's dtype */
  const void* grad_lse;  /* null: none; of the lse's type */
  /* Of the call's dtype. Of pages, which sequences may share, the last two are float32 (float64) tensors of 0, added to. */
  void *grad_q, *grad_k, *grad_v;
  int64_t grad_out_stride[4], grad_lse_stride[3], grad_q_stride[4], grad_k_stride[4], grad_v_stride[4];
  /* The gradient of the score_mod: its inputs and the gradient of its result, to the gradient of the score and the
   * results that contributions name. It reads the score_mod's captured tensors. */
  const int64_t* words;
  int64_t word_count;
  const thal_contribution* contributions;
  double* sums; /* gradients of captured tensors and of the mask */
  int64_t sum_count;
  int64_t mask_sum; /* where the gradient of an additive mask begins in `sums`, or -1 */
  int64_t mask_sum_stride[4];
} thal_gradients;

/* As for thal_attention_run. Sums over pairs are made in a fixed order too. */
THAL_API int64_t thal_gradients_workspace(const thal_attention* call, const thal_gradients* gradients);
THAL_API int thal_gradients_run(const thal_attention* call, const thal_gradients* gradients);

/* Bytes of workspace the call needs (a function of sizes, dtype, isa and num_threads, never of L * S), or -code. */
THAL_API int64_t thal_attention_workspace(const thal_attention* call);
/* Results are bitwise identical from run to run and for every num_threads. */
THAL_API int thal_attention_run(const thal_attention* call);
THAL_API const char* thal_error_text(int code);

THAL_API int32_t thal_interface_version(void);
/* Bit (1 << THAL_ISA_x) is set when this library was built with that set and both the CPU and the operating system support
 * it. The first call asks Linux for the permission to use AMX's tiles, where the CPU has them: it is the process's. */
THAL_API uint32_t thal_supported_isas(void);
THAL_API int thal_set_isa(int32_t dtype, int32_t isa);
THAL_API int32_t thal_get_isa(int32_t dtype);

/* One input of thal_program_run, and what it varies with. */
enum { THAL_SPAN_ONE = 0, THAL_SPAN_LANES = 1, THAL_SPAN_ROWS = 2, THAL_SPAN_BLOCK = 3 };

typedef struct thal_input {
  const void* data;
  int64_t stride; /* THAL_SPAN_BLOCK: elements from row to row */
  int32_t span;
  int32_t reserved;
} thal_input;

/* Evaluates a program over `rows` (1 to 128) rows of 16 elements and writes its first result, cast to `type`, to `out`:
 * float32 for 16-bit floating types, int32 for small integers and booleans. For tests, and for measuring. */
THAL_API int thal_program_run(const int64_t* words, int64_t count, int32_t isa, int64_t rows, const thal_input* inputs,
                              int64_t input_count, const thal_captured* captured, int64_t captured_count, int32_t type,
                              void* out);

/* A function mapped over lists of tensors: at every position, element by element, outputs = function(inputs). An output
 * may be an input of the same position. */

/* How an input is given: elements at each position; or one element for all, a tensor or a double; or a double at each
 * position. */
typedef enum { THAL_LIST = 0, THAL_SHARED = 1, THAL_NUMBER = 2, THAL_NUMBERS = 3 } thal_kind;
/* Where the operator writes an output: to new tensors, to a list that comes after the inputs, or over an input. */
enum { THAL_NEW = -1, THAL_GIVEN = -2 };
/* What becomes of the elements of an output at each position: they are written, or their sum, their largest, or whether
 * any is not 0. Sums are of doubles, in an order that does not depend on the number of threads; the largest of elements
 * among which one is no number is that. A reduced output is one double (int64 for integers and truth values, and for
 * THAL_ANY) at each position; of nothing it is 0, the smallest number there is, or 0. */
enum { THAL_KEEP = 0, THAL_SUM = 1, THAL_MAX = 2, THAL_ANY = 3 };

typedef struct thal_map_program {
  uint32_t struct_size; /* sizeof(thal_map_program) */
  int32_t reduction;    /* THAL_KEEP or another, for all outputs */
  const int64_t* words;
  int64_t word_count;
  int64_t inputs, outputs;
  const int32_t* output_types; /* of the function's results, places in torchhal.pointwise.dtypes.DTYPES */
  const int32_t* kinds;        /* thal_kind of each input */
  const int32_t* targets;      /* of each output THAL_NEW, THAL_GIVEN or an input; null: all new */
} thal_map_program;

/* Prepares a function; `id` names it until it is freed. */
THAL_API int thal_map_program_new(const thal_map_program* description, int64_t* id);
THAL_API void thal_map_program_free(int64_t id);

typedef struct thal_map {
  uint32_t struct_size; /* sizeof(thal_map) */
  int32_t isa;
  int64_t program;         /* of thal_map_program_new */
  int64_t positions;
  const int64_t* counts;   /* elements of each position */
  const void* const* data; /* (inputs, positions), contiguous; what is not a list has its one element at each position */
  void* const* out;        /* (outputs, positions), contiguous, or 8 bytes each */
  const thal_captured* captured;
  int64_t captured_count;
  int32_t num_threads;
  int32_t reserved;
  thal_parallel parallel; /* may be null when num_threads == 1 */
  void* parallel_user;
} thal_map;

THAL_API int thal_map_run(const thal_map* map);

/* Packed weights, (rows, columns). I8 and I4: quants in rows, contiguous, with a scale and perhaps a zero for each column of
 * each group of rows; element (q - zero) * scale. I8: signed bytes. I4: the even rows in the low halves of bytes, each stored
 * as q + 8. The others are blocks of a GGUF file: `columns` lines of rows / 32 blocks of 18, 20 and 34 bytes: a float16 scale d,
 * for Q4_1 a float16 minimum m, then 16 bytes of which element i < 16 has the low half of byte i and element 16 + i the high
 * one, or 32 signed bytes; elements d * (q - 8), d * q + m and d * q. */
enum { THAL_PACKED_I8 = 0, THAL_PACKED_I4 = 1, THAL_PACKED_Q4_0 = 2, THAL_PACKED_Q4_1 = 3, THAL_PACKED_Q8_0 = 4, THAL_PACKED_SCHEMES = 5 };

typedef struct thal_packed {
  int32_t scheme;
  int32_t transposed; /* b is the weight's transpose */
  int64_t rows, columns, group;
  const void* data;
  const float *scale, *zero; /* (ceil(rows / group), columns), of I8 and I4; zero may be null */
} thal_packed;

/* out_i = epilogue_i(a_prologue(a) @ b_prologue(b) + bias), each (batches, M, N), contiguous. Functions take (value) or
 * (value, batch, row, column), int32 indices that count in the operand the function applies to; values and sums are float32,
 * or float64 where a or b is. */
typedef struct thal_matmul {
  uint32_t struct_size; /* sizeof(thal_matmul) */
  int32_t isa;
  int32_t a_type, b_type, bias_type; /* THAL_F32 ... THAL_F64 */
  int32_t num_threads;
  int32_t batch_dims, outputs;  /* batch_dims at most 16; without an epilogue one output */
  int64_t M, N, K, batches;     /* batches: the product of batch_sizes */
  const int64_t *batch_sizes, *a_batch_stride, *b_batch_stride;
  const void *a, *b, *bias;     /* (M, K), (K, N), (N) or null */
  int64_t a_stride[2], b_stride[2], bias_stride;
  const thal_function *a_prologue, *b_prologue, *epilogue; /* null: none */
  /* Places in torchhal.pointwise.dtypes.DTYPES: of the epilogue's results, else what sums are rounded to: float32 or a
   * 16-bit floating type, or float64 of sums of that type. */
  const int32_t* out_types;
  void* const* out;
  thal_parallel parallel; /* may be null when num_threads == 1 */
  void* parallel_user;
  const thal_packed* packed; /* null: none. Else it is b for every batch, and b, its strides and batch strides are not read */
} thal_matmul;

/* Results do not depend on num_threads. Allocates what it packs: at most kSharedLeftBytes and kSharedRightBytes of matmul.hpp, and for each thread
 * about a megabyte. */
THAL_API int thal_matmul_run(const thal_matmul* call);

/* Measurements. Each returns the result, or -code. */
/* Best float32 FMA rate in GFLOP/s over `repeats` short runs on num_threads threads. */
THAL_API double thal_measure_fma(int32_t isa, int32_t repeats, int32_t num_threads, thal_parallel parallel, void* user);
/* Best rate in GFLOP/s of a single-threaded attention problem whose tiles fit in the L2 cache. */
THAL_API double thal_measure_attention(int32_t isa, int32_t dtype, int32_t repeats);
/* Best read rate in GB/s over `bytes` bytes of memory, which are allocated and freed here. */
THAL_API double thal_measure_bandwidth(int64_t bytes, int32_t repeats, int32_t num_threads, thal_parallel parallel,
                                       void* user);

/* Registration with torch through its stable C shim. The caller resolves each symbol the library names, in order,
 * and passes the addresses; a null address for a required symbol is refused with the symbol's name in `message`. Two
 * symbols, with which the operators refuse to be differentiated, may be null: the caller then sees to that. */
THAL_API int32_t thal_torch_symbol_count(void);
THAL_API const char* thal_torch_symbol_name(int32_t index);
THAL_API int thal_torch_register(void* const* addresses, int32_t count, char* message, int32_t message_size);
/* A thal_parallel that runs on torch's own threads; valid after thal_torch_register. */
THAL_API int thal_torch_parallel(int64_t n, thal_task task, void* ctx, void* user);

#ifdef __cplusplus
}
#endif
#endif
