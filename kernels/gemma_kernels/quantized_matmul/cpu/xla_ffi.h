// What these kernels use of XLA's C interface for foreign functions: the layout of its structs, of
// which versions 0.3 to 0.5 (jaxlib 0.10 to 0.12) have the same. The whole of it comes with jaxlib,
// as `jax.ffi.include_dir()/xla/ffi/api/c_api.h`; a test holds this file against that one. It is
// declared here so that the library can be compiled where no jaxlib is.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { XLA_FFI_API_MAJOR = 0, XLA_FFI_API_MINOR = 3 };
enum { XLA_FFI_Extension_Metadata = 1, XLA_FFI_ExecutionStage_EXECUTE = 3 };
typedef enum {
  XLA_FFI_DataType_S8 = 2,
  XLA_FFI_DataType_S32 = 4,
  XLA_FFI_DataType_U8 = 6,
  XLA_FFI_DataType_F16 = 10,
  XLA_FFI_DataType_F32 = 11,
  XLA_FFI_DataType_BF16 = 16,
} XLA_FFI_DataType;
typedef enum {
  XLA_FFI_Error_Code_INVALID_ARGUMENT = 3,
  XLA_FFI_Error_Code_RESOURCE_EXHAUSTED = 8,
} XLA_FFI_Error_Code;

// Structs name their size, up to their last field, and what extends them.
#define UP_TO(type, last) (offsetof(type, last) + sizeof(((type*)0)->last))
typedef struct XLA_FFI_Extension_Base {
  size_t struct_size;
  int type;
  struct XLA_FFI_Extension_Base* next;
} XLA_FFI_Extension_Base;
#define HEAD size_t struct_size; XLA_FFI_Extension_Base* extension_start

typedef struct XLA_FFI_Error XLA_FFI_Error;
typedef struct XLA_FFI_ExecutionContext XLA_FFI_ExecutionContext;
typedef struct { HEAD; int major_version, minor_version; } XLA_FFI_Api_Version;

// A handler says at registration which version it was made for.
typedef struct { size_t struct_size; XLA_FFI_Api_Version api_version; uint32_t traits; } XLA_FFI_Metadata;
typedef struct { XLA_FFI_Extension_Base base; XLA_FFI_Metadata* metadata; } XLA_FFI_Metadata_Extension;

// Functions that XLA offers.
typedef struct { HEAD; const char* message; XLA_FFI_Error_Code errc; } XLA_FFI_Error_Create_Args;
typedef struct { HEAD; XLA_FFI_Error* error; } XLA_FFI_Error_Destroy_Args;
typedef struct { HEAD; XLA_FFI_ExecutionContext* ctx; void (*task)(void*); void* data; } XLA_FFI_ThreadPool_Schedule_Args;
typedef struct { HEAD; XLA_FFI_ExecutionContext* ctx; int64_t* num_threads; } XLA_FFI_ThreadPool_NumThreads_Args;
enum {
  XLA_FFI_Error_Create_Args_STRUCT_SIZE = UP_TO(XLA_FFI_Error_Create_Args, errc),
  XLA_FFI_Error_Destroy_Args_STRUCT_SIZE = UP_TO(XLA_FFI_Error_Destroy_Args, error),
  XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE = UP_TO(XLA_FFI_ThreadPool_Schedule_Args, data),
  XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE = UP_TO(XLA_FFI_ThreadPool_NumThreads_Args, num_threads),
};
typedef struct {
  HEAD;
  XLA_FFI_Api_Version api_version;
  const void* internal_api;
  XLA_FFI_Error* (*XLA_FFI_Error_Create)(XLA_FFI_Error_Create_Args*);
  void* error_get_message;
  void (*XLA_FFI_Error_Destroy)(XLA_FFI_Error_Destroy_Args*);
  void* not_used[8];  // registration, streams, types, contexts, states, device memory
  XLA_FFI_Error* (*XLA_FFI_ThreadPool_Schedule)(XLA_FFI_ThreadPool_Schedule_Args*);
  XLA_FFI_Error* (*XLA_FFI_ThreadPool_NumThreads)(XLA_FFI_ThreadPool_NumThreads_Args*);
} XLA_FFI_Api;

// A call of a handler.
typedef struct { HEAD; XLA_FFI_DataType dtype; void* data; int64_t rank; int64_t* dims; } XLA_FFI_Buffer;
typedef struct { HEAD; int64_t size; int* types; void** args; } XLA_FFI_Args;
typedef struct { HEAD; int64_t size; int* types; void** rets; } XLA_FFI_Rets;
typedef struct {
  HEAD;
  const XLA_FFI_Api* api;
  XLA_FFI_ExecutionContext* ctx;
  int stage;
  XLA_FFI_Args args;
  XLA_FFI_Rets rets;
} XLA_FFI_CallFrame;
#undef HEAD
