/* The decoders of tprpc_cuda.h's section `wire`: control messages and parts. The first byte is how many descriptors came
   with it, the rest is what a peer sent. What is accepted obeys its limits; and written again it is read the same. */
#define TPRPC_IMPLEMENTATION
#define TPRPC_CUDA_IMPLEMENTATION
#define TPRPC_TEST_HOOKS
#include "../../tprpc.h"
#include "../../tprpc_cuda.h"

static void check(bool held) { if (!held) abort(); }

static void try_parts(const uint8_t *bytes, size_t count, uint64_t total) {
    for (size_t i = 0; i < count; i++, bytes += TPR_CUDA_WIRE_PART) {
        tpr_cuda_wire_part one, two;
        uint8_t again[TPR_CUDA_WIRE_PART];
        memset(&one, 0, sizeof one);
        memset(&two, 0, sizeof two);
        if (!tpr_cuda_wire_read_part(bytes, total, TPR_CUDA_WORD_SLOTS, &one)) continue;
        check(one.size && one.at < total && one.size <= total - one.at && one.slot < TPR_CUDA_WORD_SLOTS);
        tpr_cuda_wire_write_part(again, &one);
        check(memcmp(again, bytes, sizeof again) == 0);
        check(tpr_cuda_wire_read_part(again, total, TPR_CUDA_WORD_SLOTS, &two) && memcmp(&one, &two, sizeof one) == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    tpr_cuda_wire_message one, two;
    uint8_t again[TPR_CUDA_WIRE_CONTROL + TPR_CUDA_WIRE_PARTS * TPR_CUDA_WIRE_PART];
    if (!size) return 0;
    const size_t handles = data[0] % 3, length = size - 1;
    uint8_t *block = (uint8_t *)malloc(length ? length : 1);   /* of its size, so that a byte too many is seen */
    check(block != NULL);
    memcpy(block, data + 1, length);
    memset(&one, 0, sizeof one);
    memset(&two, 0, sizeof two);
    if (tpr_cuda_wire_read(block, length, handles, &one)) {
        check(one.kind >= TPR_CUDA_WIRE_WANT && one.kind <= TPR_CUDA_WIRE_ASK && length <= sizeof again);
        check(handles == (tpr_cuda_wire_has_handle(one.kind) ? 1u : 0u));
        memcpy(again, block, length);
        tpr_cuda_wire_write(again, &one);
        check(memcmp(again, block, length) == 0);
        check(tpr_cuda_wire_read(again, length, handles, &two) && memcmp(&one, &two, sizeof one) == 0);
        if (one.kind == TPR_CUDA_WIRE_PARTS_OF) try_parts(block + TPR_CUDA_WIRE_CONTROL, (size_t)one.size, one.id);
    }
    try_parts(block, length / TPR_CUDA_WIRE_PART, (uint64_t)length << data[0] % 32);
    free(block);
    return 0;
}
