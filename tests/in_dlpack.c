/* Tensors from DLPack and to it, against a declaration of DLPack of our own (dlpack_abi.h). */
#include "harness.h"
#include "dlpack_abi.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_ASSERT(condition) ((void)0)   /* misuse is tried as in a release build */
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "pipe_common.h"

#ifdef TEST_DLPACK_OLD
enum { OLD = 1, kDLBool = 6 };
#else
enum { OLD = 0 };
#endif

/* A tensor as another library would make it; its deleter counts and frees it. */
typedef struct tensor { DLManagedTensor managed; int64_t shape[12], strides[12]; float data[64]; } tensor;
static int deleted;

static void delete_tensor(DLManagedTensor *self) {
    deleted++;
    free(self->manager_ctx);
}

/* A float tensor of these dimensions, without strides. */
static tensor *make(int32_t ndim, const int64_t *shape) {
    tensor *t = (tensor *)calloc(1, sizeof *t);
    REQUIRE(t != NULL);
    t->managed.manager_ctx = t;
    t->managed.deleter = delete_tensor;
    t->managed.dl_tensor.data = t->data;
    t->managed.dl_tensor.device.device_type = kDLCPU;
    t->managed.dl_tensor.ndim = ndim;
    t->managed.dl_tensor.dtype.code = kDLFloat;
    t->managed.dl_tensor.dtype.bits = 32;
    t->managed.dl_tensor.dtype.lanes = 1;
    t->managed.dl_tensor.shape = t->shape;
    for (int32_t i = 0; i < ndim; i++) t->shape[i] = shape[i];
    return t;
}

static tensor *make_2x3(void) {
    static const int64_t shape[] = {2, 3};
    return make(2, shape);
}

static void set_strides(tensor *t, int64_t a, int64_t b, int64_t c) {
    t->strides[0] = a;
    t->strides[1] = b;
    t->strides[2] = c;
    t->managed.dl_tensor.strides = t->strides;
}

/* The tensor is refused with that status and a text that has `part` in it, and stays its maker's; it is freed here. */
static void refuse(tensor *t, tprpc_status status, const char *part) {
    DLManagedTensor before = t->managed;
    tprpc_tensor out, out_before;
    tprpc_message message;
    tprpc_error error;
    memset(&error, 0, sizeof error);
    memset(&message, 0, sizeof message);
    memset(&out, 0x5a, sizeof out);
    out_before = out;
    CHECK_EQ_INT(tprpc_from_dlpack(&t->managed, &out, &message, &error), status);
    CHECK_EQ_INT(error.status, status);
    CHECK_CONTAINS(error.text, part);
    CHECK_EQ_INT(tprpc_from_dlpack(&t->managed, &out, NULL, NULL), status);
    CHECK(message.release == NULL && message.release_user == NULL);
    CHECK_MEM(&out, &out_before, sizeof out);
    CHECK_MEM(&t->managed, &before, sizeof before);
    CHECK_EQ_INT(deleted, 0);
    delete_tensor(&t->managed);
    CHECK_EQ_INT(deleted, 1);
    deleted = 0;
}

/* The tensor is taken, and has that size. */
static void take(tensor *t, size_t size) {
    tprpc_tensor out;
    tprpc_error error;
    error.text[0] = 0;
    CHECK_EQ_INT(tprpc_from_dlpack(&t->managed, &out, NULL, &error), TPRPC_OK);
    CHECK_STR(error.text, "");
    CHECK_EQ_INT(out.size, size);
    for (int32_t i = 0; i < TPRPC_MAX_DIMS; i++) CHECK_EQ_INT(out.strides[i], 0);
    delete_tensor(&t->managed);
    deleted = 0;
}

TEST(dlpack_shows_a_tensor_and_its_deleter_once) {
    tensor *t = make_2x3();
    tprpc_tensor out;
    tprpc_message message;
    tprpc_error error;
    memset(&out, 0x5a, sizeof out);
    memset(&message, 0, sizeof message);
    message.metadata_size = 7;
    REQUIRE_EQ_INT(tprpc_from_dlpack(&t->managed, &out, &message, &error), TPRPC_OK);
    CHECK(out.data == t->data);
    CHECK_EQ_INT(out.size, 24);
    CHECK_EQ_INT(out.device.kind, TPRPC_CPU);
    CHECK_EQ_INT(out.device.index, 0);
    CHECK_EQ_INT(out.dtype, TPRPC_F32);
    CHECK_EQ_INT(out.ndim, 2);
    CHECK_EQ_INT(out.shape[0], 2);
    CHECK_EQ_INT(out.shape[1], 3);
    CHECK_EQ_INT(out.shape[2], 0);
    CHECK(out.stream == NULL && out.metadata == NULL && out.metadata_size == 0);
    CHECK_EQ_INT(out.target.kind, TPRPC_DEVICE_DEFAULT);
    CHECK_EQ_INT(message.metadata_size, 7);
    CHECK_EQ_INT(deleted, 0);
    REQUIRE(message.release != NULL);
    message.release(message.release_user);   /* as the library does, once: the address sanitizer sees a second */
    CHECK_EQ_INT(deleted, 1);
}

TEST(dlpack_without_deleter) {
    tensor *t = make_2x3();
    tprpc_tensor out;
    tprpc_message message;
    memset(&message, 0, sizeof message);
    t->managed.deleter = NULL;
    REQUIRE_EQ_INT(tprpc_from_dlpack(&t->managed, &out, &message, NULL), TPRPC_OK);
    REQUIRE(message.release != NULL);
    message.release(message.release_user);
    free(t);
}

TEST(dlpack_a_message_keeps_the_release_it_has) {
    tensor *one = make_2x3(), *two = make_2x3();
    tprpc_tensor out[2];
    tprpc_message message;
    tprpc_error error;
    memset(&message, 0, sizeof message);
    REQUIRE_EQ_INT(tprpc_from_dlpack(&one->managed, &out[0], &message, &error), TPRPC_OK);
    CHECK_EQ_INT(tprpc_from_dlpack(&two->managed, &out[1], &message, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "release");
    CHECK(message.release_user == &one->managed);
    CHECK_EQ_INT(deleted, 0);
    message.release(message.release_user);
    delete_tensor(&two->managed);
    CHECK_EQ_INT(deleted, 2);
}

TEST(dlpack_strides) {
    static const int64_t shape[] = {4, 1, 3}, long_shape[] = {2, 2, 2}, row[] = {1, 6, 1};
    tensor *t = make(3, shape);
    set_strides(t, 3, 3, 1);
    take(t, 48);
    t = make(3, shape);
    set_strides(t, 3, 12345, 1);        /* of a dimension of size 1 the stride means nothing */
    take(t, 48);
    t = make(3, row);
    set_strides(t, -7, 1, 0);
    take(t, 24);
    t = make(3, shape);
    set_strides(t, 1, 1, 4);            /* transposed */
    refuse(t, TPRPC_ERROR_UNSUPPORTED, "strided");
    t = make(3, shape);
    set_strides(t, 4, 4, 1);            /* padded rows */
    refuse(t, TPRPC_ERROR_UNSUPPORTED, "dimension 0 has stride 4, contiguous is 3");
    t = make(3, shape);
    set_strides(t, 6, 3, 2);            /* every other element */
    refuse(t, TPRPC_ERROR_UNSUPPORTED, "strided");
    t = make(3, shape);
    set_strides(t, 0, 0, 1);            /* broadcast */
    refuse(t, TPRPC_ERROR_UNSUPPORTED, "strided");
    t = make(3, long_shape);
    set_strides(t, -4, 2, 1);           /* backwards */
    refuse(t, TPRPC_ERROR_UNSUPPORTED, "strided");
}

TEST(dlpack_byte_offset) {
    tensor *t = make_2x3();
    tprpc_tensor out;
    t->managed.dl_tensor.byte_offset = 40;
    REQUIRE_EQ_INT(tprpc_from_dlpack(&t->managed, &out, NULL, NULL), TPRPC_OK);
    CHECK(out.data == t->data + 10);
    CHECK_EQ_INT(out.size, 24);
    delete_tensor(&t->managed);
}

typedef struct type { int code, bits; int32_t dtype; size_t size; } type;
static const type types[] = {
    {kDLBool, 8, TPRPC_BOOL, 1}, {kDLInt, 8, TPRPC_I8, 1}, {kDLInt, 16, TPRPC_I16, 2}, {kDLInt, 32, TPRPC_I32, 4},
    {kDLInt, 64, TPRPC_I64, 8}, {kDLUInt, 8, TPRPC_U8, 1}, {kDLUInt, 16, TPRPC_U16, 2}, {kDLUInt, 32, TPRPC_U32, 4},
    {kDLUInt, 64, TPRPC_U64, 8}, {kDLFloat, 16, TPRPC_F16, 2}, {kDLBfloat, 16, TPRPC_BF16, 2},
    {kDLFloat, 32, TPRPC_F32, 4}, {kDLFloat, 64, TPRPC_F64, 8}, {kDLComplex, 64, TPRPC_C64, 8},
    {kDLComplex, 128, TPRPC_C128, 16}};

/* Every pair of code and bits: the table's are taken, all others refused by name. */
TEST(dlpack_types) {
    for (int code = 0; code < 256; code++) {
        for (int bits = 0; bits < 256; bits++) {
            const type *known = NULL;
            tensor *t = make_2x3();
            tprpc_tensor out;
            t->managed.dl_tensor.dtype.code = (uint8_t)code;
            t->managed.dl_tensor.dtype.bits = (uint8_t)bits;
            for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
                if (types[i].code == code && types[i].bits == bits) known = &types[i];
            if (!known) {
                refuse(t, TPRPC_ERROR_UNSUPPORTED, bits % 8 || !bits ? "no whole bytes" : "type code");
                continue;
            }
            REQUIRE_EQ_INT(tprpc_from_dlpack(&t->managed, &out, NULL, NULL), TPRPC_OK);
            CHECK_EQ_INT(out.dtype, known->dtype);
            CHECK_EQ_INT(out.size, 6 * known->size);
            take(t, 6 * known->size);
        }
    }
}

TEST(dlpack_lanes_and_dimensions) {
    static const int64_t ones[12] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    tensor *t = make_2x3();
    t->managed.dl_tensor.dtype.lanes = 4;
    refuse(t, TPRPC_ERROR_UNSUPPORTED, "4 lanes");
    t = make_2x3();
    t->managed.dl_tensor.dtype.lanes = 0;
    refuse(t, TPRPC_ERROR_UNSUPPORTED, "0 lanes");
    take(make(TPRPC_MAX_DIMS, ones), 4);
    refuse(make(TPRPC_MAX_DIMS + 1, ones), TPRPC_ERROR_UNSUPPORTED, "9 dimensions, at most 8");
    t = make_2x3();
    t->managed.dl_tensor.ndim = INT32_MAX;
    refuse(t, TPRPC_ERROR_UNSUPPORTED, "dimensions");
    t = make_2x3();
    t->managed.dl_tensor.ndim = -1;
    refuse(t, TPRPC_ERROR_INVALID, "-1 dimensions");
    t = make_2x3();
    t->managed.dl_tensor.shape = NULL;
    refuse(t, TPRPC_ERROR_INVALID, "no shape");
}

TEST(dlpack_devices) {
    for (int device = -1; device < 20; device++) {
        tensor *t = make_2x3();
        tprpc_tensor out;
        t->managed.dl_tensor.device.device_type = (DLDeviceType)device;
        t->managed.dl_tensor.device.device_id = 3;
        if (device != kDLCPU && device != kDLCUDA && device != kDLCUDAHost) {
            char name[40];
            snprintf(name, sizeof name, "device type %d", device);
            refuse(t, TPRPC_ERROR_UNSUPPORTED, name);
            continue;
        }
        REQUIRE_EQ_INT(tprpc_from_dlpack(&t->managed, &out, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(out.device.kind, device == kDLCUDA ? TPRPC_CUDA : TPRPC_CPU);
        CHECK_EQ_INT(out.device.index, device == kDLCUDA ? 3 : 0);
        take(t, 24);
    }
}

TEST(dlpack_sizes) {
    static const int64_t empty[] = {3, 0, 5}, negative[] = {2, -1}, both[] = {-1, 0};
    static const int64_t large[] = {INT64_C(1) << 40, 4, 2}, edge[] = {INT64_C(1) << 59, 2};
    static const int64_t past[] = {INT64_C(1) << 60, 2}, hidden[] = {INT64_MAX, INT64_MAX, 0};
    tensor *t = make(0, empty);         /* a scalar */
    t->managed.dl_tensor.shape = NULL;
    take(t, 4);
    take(make(3, empty), 0);
    t = make(3, empty);
    t->managed.dl_tensor.data = NULL;
    t->managed.dl_tensor.byte_offset = 64;
    set_strides(t, 17, -3, 9);          /* an empty tensor is contiguous whatever they say */
    take(t, 0);
    take(make(3, hidden), 0);
    take(make(3, large), (size_t)1 << 45);
    take(make(2, edge), (size_t)1 << 62);   /* the largest power of two that fits an int64_t */
    refuse(make(2, past), TPRPC_ERROR_INVALID, "dimension 0");
    refuse(make(2, negative), TPRPC_ERROR_INVALID, "dimension 1 cannot be -1");
    refuse(make(2, both), TPRPC_ERROR_INVALID, "dimension 0 cannot be -1");
    t = make_2x3();
    t->managed.dl_tensor.data = NULL;
    refuse(t, TPRPC_ERROR_INVALID, "24 bytes");
}

TEST(dlpack_misuse) {
    tensor *t = make_2x3();
    tprpc_tensor mine;
    DLTensor out;
    int64_t shape[TPRPC_MAX_DIMS];
    memset(&mine, 0, sizeof mine);
    CHECK_EQ_INT(tprpc_from_dlpack(NULL, &mine, NULL, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_from_dlpack(&t->managed, NULL, NULL, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_to_dlpack(NULL, &out, shape, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_to_dlpack(&mine, NULL, shape, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_to_dlpack(&mine, &out, NULL, NULL), TPRPC_ERROR_INVALID);
    delete_tensor(&t->managed);
}

static tprpc_tensor ours(int32_t dtype, size_t element) {
    static float data[64];
    tprpc_tensor t;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.dtype = dtype;
    t.ndim = 2;
    t.shape[0] = 2;
    t.shape[1] = 3;
    t.size = 6 * element;
    return t;
}

/* A tensor of ours is refused with that status and text, and nothing but the shape array was written. */
static void refuse_ours(tprpc_tensor t, tprpc_status status, const char *part) {
    DLTensor out, before;
    int64_t shape[TPRPC_MAX_DIMS];
    tprpc_error error;
    memset(&error, 0, sizeof error);
    memset(&out, 0x5a, sizeof out);
    before = out;
    CHECK_EQ_INT(tprpc_to_dlpack(&t, &out, shape, &error), status);
    CHECK_CONTAINS(error.text, part);
    CHECK_MEM(&out, &before, sizeof out);
}

TEST(dlpack_to_types_and_back) {
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        tprpc_tensor t = ours(types[i].dtype, types[i].size), back;
        DLManagedTensor managed;
        int64_t shape[TPRPC_MAX_DIMS];
        memset(&managed, 0, sizeof managed);
        if (OLD && types[i].code == kDLBool) {
            refuse_ours(t, TPRPC_ERROR_UNSUPPORTED, "type code 6");
            continue;
        }
        REQUIRE_EQ_INT(tprpc_to_dlpack(&t, &managed.dl_tensor, shape, NULL), TPRPC_OK);
        CHECK(managed.dl_tensor.data == t.data);
        CHECK_EQ_INT(managed.dl_tensor.device.device_type, kDLCPU);
        CHECK_EQ_INT(managed.dl_tensor.device.device_id, 0);
        CHECK_EQ_INT(managed.dl_tensor.dtype.code, types[i].code);
        CHECK_EQ_INT(managed.dl_tensor.dtype.bits, types[i].bits);
        CHECK_EQ_INT(managed.dl_tensor.dtype.lanes, 1);
        CHECK_EQ_INT(managed.dl_tensor.ndim, 2);
        CHECK(managed.dl_tensor.shape == shape);
        CHECK(managed.dl_tensor.strides == NULL);
        CHECK_EQ_INT(managed.dl_tensor.byte_offset, 0);
        REQUIRE_EQ_INT(tprpc_from_dlpack(&managed, &back, NULL, NULL), TPRPC_OK);
        t.device.kind = TPRPC_CPU;
        CHECK_MEM(&back, &t, sizeof t);
    }
}

TEST(dlpack_to_others) {
    tprpc_tensor t = ours(TPRPC_F32, 4);
    DLTensor out;
    int64_t shape[TPRPC_MAX_DIMS];
    t.device.kind = TPRPC_CUDA;
    t.device.index = 5;
    REQUIRE_EQ_INT(tprpc_to_dlpack(&t, &out, shape, NULL), TPRPC_OK);
    CHECK_EQ_INT(out.device.device_type, kDLCUDA);
    CHECK_EQ_INT(out.device.device_id, 5);
    t.device.kind = TPRPC_DEVICE_USER;
    refuse_ours(t, TPRPC_ERROR_UNSUPPORTED, "device kind 64");

    t = ours(TPRPC_BYTES, 1);           /* raw bytes, with a shape and without */
    REQUIRE_EQ_INT(tprpc_to_dlpack(&t, &out, shape, NULL), TPRPC_OK);
    CHECK_EQ_INT(out.ndim, 2);
    CHECK_EQ_INT(out.dtype.code, kDLUInt);
    CHECK_EQ_INT(out.dtype.bits, 8);
    t.ndim = 0;
    t.size = 41;
    REQUIRE_EQ_INT(tprpc_to_dlpack(&t, &out, shape, NULL), TPRPC_OK);
    CHECK_EQ_INT(out.ndim, 1);
    CHECK_EQ_INT(shape[0], 41);
    t.size = 0;
    t.data = NULL;
    REQUIRE_EQ_INT(tprpc_to_dlpack(&t, &out, shape, NULL), TPRPC_OK);
    CHECK_EQ_INT(shape[0], 0);

    t = ours(TPRPC_F32, 4);             /* strides that say the same are none */
    t.strides[0] = 3;
    t.strides[1] = 1;
    REQUIRE_EQ_INT(tprpc_to_dlpack(&t, &out, shape, NULL), TPRPC_OK);
    CHECK(out.strides == NULL);
    t.strides[0] = 4;
    refuse_ours(t, TPRPC_ERROR_UNSUPPORTED, "strided");
    t = ours(TPRPC_F32, 4);
    t.size = 23;
    refuse_ours(t, TPRPC_ERROR_INVALID, "size is 23, shape and dtype make 24");
    t = ours(TPRPC_F32, 4);
    t.shape[0] = -2;
    refuse_ours(t, TPRPC_ERROR_INVALID, "dimension 0");
    t.ndim = -1;
    refuse_ours(t, TPRPC_ERROR_INVALID, "none");
    t.ndim = TPRPC_MAX_DIMS + 1;
    refuse_ours(t, TPRPC_ERROR_INVALID, "none");
    t = ours(TPRPC_F32, 4);
    t.dtype = TPRPC_C128 + 1;
    refuse_ours(t, TPRPC_ERROR_INVALID, "none");
    t.dtype = -1;
    refuse_ours(t, TPRPC_ERROR_INVALID, "none");
}

/* ---- over a pipe ---- */

typedef struct seen { outcome o; tprpc_tensor tensor; float values[64]; } seen;

static void on_seen(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    seen *s = (seen *)user;
    if (m && CHECK_EQ_INT(m->tensor_count, 1) && CHECK_LE_INT(m->tensors[0].size, sizeof s->values)) {
        s->tensor = m->tensors[0];
        memcpy(s->values, s->tensor.data, s->tensor.size);
    }
    outcome_set(&s->o, status, error);
}

/* Sent as it is lent, and given back to its maker once: when it has arrived, or when the pipe is over before. */
static void send_one(const char *transports, const char *address, bool arrives) {
    static const int64_t shape[] = {4, 8};
    tensor *t = make(2, shape);
    tprpc_tensor out;
    tprpc_message message;
    outcome wrote;
    seen got;
    pair p;
    memset(&message, 0, sizeof message);
    memset(&wrote, 0, sizeof wrote);
    memset(&got, 0, sizeof got);
    for (int i = 0; i < 32; i++) t->data[i] = (float)i / 4;
    pair_open(&p, transports, address, 0, 0);
    REQUIRE_EQ_INT(tprpc_from_dlpack(&t->managed, &out, &message, NULL), TPRPC_OK);
    message.tensors = &out;
    message.tensor_count = 1;
    if (arrives) REQUIRE_EQ_INT(tprpc_pipe_read(p.a, NULL, on_seen, &got), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_write(p.b, &message, on_written, &wrote), TPRPC_OK);
    CHECK_LE_INT(deleted, 1);
    if (arrives) {
        WAIT(&p.s, got.o.runs, 1);
        REQUIRE_EQ_INT(got.o.status, TPRPC_OK);
        CHECK_EQ_INT(got.tensor.dtype, TPRPC_F32);
        CHECK_EQ_INT(got.tensor.ndim, 2);
        CHECK_EQ_INT(got.tensor.shape[0], 4);
        CHECK_EQ_INT(got.tensor.shape[1], 8);
        if (CHECK_EQ_INT(got.tensor.size, 128))
            for (int i = 0; i < 32; i++) CHECK(got.values[i] == (float)i / 4);
        WAIT(&p.s, wrote.runs, 1);
        CHECK_EQ_INT(wrote.status, TPRPC_OK);
        WAIT(&p.s, deleted, 1);
    }
    pair_close(&p);
    CHECK_EQ_INT(wrote.runs, 1);
    CHECK_EQ_INT(deleted, 1);
}

TEST(dlpack_sent_over_tcp) { send_one("tcp", "tcp://127.0.0.1:0", true); }
TEST(dlpack_sent_over_shm) { send_one("shm", "shm://", true); }
TEST(dlpack_sent_to_who_does_not_read) { send_one("tcp", "tcp://127.0.0.1:0", false); }
