/* What every section stands on: atomic, os and base. TEST_SEED=n repeats a random run: a failure shows its n. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"

static uint64_t random_state;
static uint64_t random_u64(void) { return test_random(&random_state); }
static uint64_t random_below(uint64_t n) { return random_u64() % n; }

static void seed(void) {
    const char *given = getenv("TEST_SEED");
    random_state = given ? strtoull(given, NULL, 10) : (uint64_t)test_now_us() * 1000003u + (uint64_t)getpid();
    fprintf(stderr, "TEST_SEED=%llu repeats this run\n", (unsigned long long)random_state);
}

/* ---- the hook: counts calls of one name, lowers their size, and fails them from the `fail_from`-th on ------------ */

static const char *fail_call;
static int fail_from, fail_with, calls_seen;
static int64_t fail_size;                 /* 0: sizes are left as they are */

static int on_call(const char *call, int64_t *size) {
    if (strcmp(call, fail_call) != 0) return 0;
    if (fail_size && *size > fail_size) *size = fail_size;
    return __sync_fetch_and_add(&calls_seen, 1) >= fail_from ? fail_with : 0;
}

static void hook(const char *call, int from, int with) {
    fail_call = call;
    fail_from = from;
    fail_with = with;
    fail_size = 0;
    calls_seen = 0;
    TPR_ATOMIC_STORE(&tprpc_test_hook, on_call);
}

static void unhook(void) { TPR_ATOMIC_STORE(&tprpc_test_hook, (int (*)(const char *, int64_t *))NULL); }

/* ---- memory: an allocator that remembers what was asked, and demands it back the same ---------------------------- */

typedef struct header { size_t size, align; uint32_t tag, magic; void *block; } header;
static uint64_t live_bytes, live_blocks, allocations, asked;   /* asked: those refused too */

static void *user_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    void *block = NULL;
    size_t room = align < 64 ? 64 : align;      /* for the header, before what is handed out */
    header *h;
    uint8_t *p;
    TPR_ATOMIC_ADD(&asked, UINT64_C(1));
    CHECK(user == &live_bytes && size > 0 && align > 0 && (align & (align - 1)) == 0);
    if (size > (size_t)1 << 40 || posix_memalign(&block, room, size + room) != 0) return NULL;
    p = (uint8_t *)block + room;
    h = (header *)(void *)(p - sizeof *h);
    h->size = size;
    h->align = align;
    h->tag = tag;
    h->magic = 0x51ed51ed;
    h->block = block;
    memset(p, 0xcd, size);
    TPR_ATOMIC_ADD(&live_bytes, (uint64_t)size);
    TPR_ATOMIC_ADD(&live_blocks, UINT64_C(1));
    TPR_ATOMIC_ADD(&allocations, UINT64_C(1));
    return p;
}

static void user_free(void *ptr, size_t size, uint32_t tag, void *user) {
    header *h = (header *)(void *)((uint8_t *)ptr - sizeof *h);
    CHECK(user == &live_bytes);
    REQUIRE_EQ_INT(h->magic, 0x51ed51ed);
    CHECK_EQ_INT(h->size, size);
    CHECK_EQ_INT(h->tag, tag);
    TPR_ATOMIC_SUB(&live_bytes, (uint64_t)size);
    TPR_ATOMIC_SUB(&live_blocks, UINT64_C(1));
    free(h->block);
}

static tpr_base_memory memory_of(uint64_t limit) {
    tpr_base_memory memory;
    memset(&memory, 0, sizeof memory);
    memory.hooks.alloc = user_alloc;
    memory.hooks.free = user_free;
    memory.hooks.user = &live_bytes;
    memory.limit = limit;
    return memory;
}

static void check_all_given_back(const tpr_base_memory *memory) {
    CHECK_EQ_INT(memory->used, 0);
    CHECK_EQ_INT(live_bytes, 0);
    CHECK_EQ_INT(live_blocks, 0);
}

TEST(base_memory_limit) {
    tpr_base_memory memory = memory_of(1000);
    void *a = tpr_base_alloc(&memory, 600, 16, 1), *b, *none;
    REQUIRE(a != NULL);
    CHECK(tpr_base_alloc(&memory, 401, 16, 2) == NULL);
    CHECK_EQ_INT(memory.used, 600);
    b = tpr_base_alloc(&memory, 400, 16, 2);
    REQUIRE(b != NULL);
    CHECK_EQ_INT(memory.used, 1000);
    CHECK(tpr_base_alloc(&memory, 1, 16, 3) == NULL);
    CHECK(tpr_base_alloc(&memory, SIZE_MAX, 16, 3) == NULL);          /* the sum wraps round */
    CHECK(tpr_base_alloc(&memory, SIZE_MAX - 999, 16, 3) == NULL);    /* to 0 exactly */
    CHECK_EQ_INT(memory.used, 1000);
    CHECK_EQ_INT(asked, 2);
    none = tpr_base_alloc(&memory, 0, 16, 4);                         /* no bytes: a pointer all the same */
    CHECK(none != NULL);
    CHECK_EQ_INT(memory.used, 1000);
    tpr_base_free(&memory, b, 400, 2);
    tpr_base_free(&memory, none, 0, 4);
    tpr_base_free(&memory, NULL, 77, 9);
    CHECK_EQ_INT(memory.used, 600);
    b = tpr_base_new(&memory, 400, 5);
    REQUIRE(b != NULL);
    for (int i = 0; i < 400; i++) CHECK_EQ_INT(((uint8_t *)b)[i], 0);
    CHECK_EQ_INT((uintptr_t)b % 64, 0);
    CHECK(tpr_base_new(&memory, 1, 5) == NULL);
    tpr_base_free(&memory, b, 400, 5);
    tpr_base_free(&memory, a, 600, 1);
    check_all_given_back(&memory);
}

TEST(base_memory_that_fails_is_not_counted) {
    tpr_base_memory memory = memory_of(UINT64_MAX);
    CHECK(tpr_base_alloc(&memory, (size_t)1 << 50, 64, 1) == NULL);   /* the allocator has none */
    CHECK_EQ_INT(memory.used, 0);
    hook("alloc", 0, ENOMEM);
    CHECK(tpr_base_alloc(&memory, 10, 64, 1) == NULL);
    CHECK_EQ_INT(calls_seen, 1);
    unhook();
    check_all_given_back(&memory);
    CHECK_EQ_INT(allocations, 0);
}

TEST(base_memory_default_allocator) {
    tpr_base_memory memory = memory_of(UINT64_MAX);
    memory.hooks.alloc = tpr_base_default_alloc;
    memory.hooks.free = tpr_base_default_free;
    for (size_t align = 1; align <= 4096; align *= 2) {
        uint8_t *p = (uint8_t *)tpr_base_alloc(&memory, 1000, align, 1);
        REQUIRE(p != NULL);
        CHECK_EQ_INT((uintptr_t)p % align, 0);
        memset(p, 1, 1000);
        tpr_base_free(&memory, p, 1000, 1);
    }
    CHECK_EQ_INT(memory.used, 0);
}

enum { THREADS = 4 };
static void run_threads(void (*run)(void *), void *arg) {
    tpr_os_thread threads[THREADS];
    for (int i = 0; i < THREADS; i++) REQUIRE_EQ_INT(tpr_os_thread_start(&threads[i], run, arg), 0);
    for (int i = 0; i < THREADS; i++) tpr_os_thread_join(&threads[i]);
}

static void memory_thread(void *arg) {
    tpr_base_memory *memory = (tpr_base_memory *)arg;
    void *blocks[16] = {NULL};
    size_t sizes[16] = {0};
    for (int i = 0; i < 20000; i++) {
        size_t at = (size_t)i * 7 % 16;
        tpr_base_free(memory, blocks[at], sizes[at], 1);
        sizes[at] = (size_t)(i % 300 + 1);
        blocks[at] = tpr_base_alloc(memory, sizes[at], 16, 1);
        if (!blocks[at]) sizes[at] = 0;
        CHECK(TPR_ATOMIC_LOAD(&live_bytes) <= 4000);
    }
    for (int i = 0; i < 16; i++) tpr_base_free(memory, blocks[i], sizes[i], 1);
}

TEST(base_memory_of_many_threads) {
    tpr_base_memory memory = memory_of(4000);       /* less than they ask for */
    run_threads(memory_thread, &memory);
    check_all_given_back(&memory);
}

/* ---- pool -------------------------------------------------------------------------------------------------------- */

TEST(base_pool_classes) {
    size_t last = (size_t)TPR_BASE_POOL_LEAST << (TPR_BASE_POOL_CLASSES - 1);
    CHECK_EQ_INT(last, 128 * 1024);
    for (size_t size = 0; size <= last; size++) {
        uint32_t c = tpr_base_pool_class(size);
        REQUIRE(c < TPR_BASE_POOL_CLASSES && size <= (size_t)TPR_BASE_POOL_LEAST << c);
        REQUIRE(c == 0 || size > (size_t)TPR_BASE_POOL_LEAST << (c - 1));
    }
    CHECK_EQ_INT(tpr_base_pool_class(last + 1), TPR_BASE_POOL_CLASSES);
    CHECK_EQ_INT(tpr_base_pool_class(SIZE_MAX), TPR_BASE_POOL_CLASSES);
}

TEST(base_pool) {
    static void *blocks[2000];
    static size_t sizes[2000];
    tpr_base_memory memory = memory_of(UINT64_MAX);
    tpr_base_pool pool;
    uint64_t warm = 0;
    seed();
    memset(&pool, 0, sizeof pool);
    pool.memory = &memory;
    for (int i = 0; i < 200000; i++) {
        size_t at = (size_t)random_below(i < 100000 ? 2000 : 20);
        if (i == 100000) warm = allocations;
        tpr_base_pool_free(&pool, blocks[at], sizes[at]);
        blocks[at] = NULL;
        sizes[at] = (size_t)(random_u64() >> (47 + random_below(17)));   /* up to 128 KiB, any power of two as often */
        if (random_below(1000) == 0 && i < 100000) sizes[at] += 200000;
        if (random_below(8) == 0) continue;
        blocks[at] = tpr_base_pool_alloc(&pool, sizes[at]);
        REQUIRE(blocks[at] != NULL && (uintptr_t)blocks[at] % 64 == 0);
        memset(blocks[at], i & 0xff, sizes[at]);
    }
    for (int i = 0; i < 2000; i++) tpr_base_pool_free(&pool, blocks[i], sizes[i]);
    for (uint32_t c = 0; c < TPR_BASE_POOL_CLASSES; c++) {
        size_t whole = (size_t)TPR_BASE_POOL_LEAST << c, count = 0;
        for (tpr_base_block *block = pool.free[c]; block; block = block->next) count++;
        CHECK_EQ_INT(pool.kept[c], count);
        CHECK(count * whole <= TPR_BASE_POOL_KEEP || count <= 16);
    }
    CHECK(allocations - warm < 2000);               /* 100,000 more turns with few blocks in use: all from the pool */
    tpr_base_pool_clear(&pool);
    check_all_given_back(&memory);
    tpr_base_pool_clear(&pool);                     /* of an empty one: nothing */
}

TEST(base_pool_keeps_a_few_large_blocks) {
    enum { SIZE = 400000, HUGE_SIZE = TPR_BASE_POOL_SPARE + 1 };
    tpr_base_memory memory = memory_of(UINT64_MAX);
    tpr_base_pool pool;
    void *blocks[TPR_BASE_POOL_SPARES + 2];
    memset(&pool, 0, sizeof pool);
    pool.memory = &memory;
    for (int i = 0; i < TPR_BASE_POOL_SPARES + 2; i++) blocks[i] = tpr_base_pool_alloc(&pool, SIZE);
    for (int i = 0; i < TPR_BASE_POOL_SPARES + 2; i++) tpr_base_pool_free(&pool, blocks[i], SIZE);
    CHECK_EQ_INT(memory.used, TPR_BASE_POOL_SPARES * (uint64_t)SIZE);
    const uint64_t warm = allocations;
    for (int i = 0; i < 1000; i++) {
        void *a = tpr_base_pool_alloc(&pool, SIZE), *b = tpr_base_pool_alloc(&pool, SIZE);
        REQUIRE(a && b && a != b);
        memset(a, 1, SIZE);
        tpr_base_pool_free(&pool, b, SIZE);
        tpr_base_pool_free(&pool, a, SIZE);
    }
    CHECK_EQ_INT(allocations - warm, 0);
    tpr_base_pool_free(&pool, tpr_base_pool_alloc(&pool, SIZE + 1), SIZE + 1);   /* of another size: takes a place */
    CHECK_EQ_INT(allocations - warm, 1);
    CHECK_EQ_INT(memory.used, TPR_BASE_POOL_SPARES * (uint64_t)SIZE + 1);
    tpr_base_pool_free(&pool, tpr_base_pool_alloc(&pool, HUGE_SIZE), HUGE_SIZE);
    CHECK_EQ_INT(memory.used, TPR_BASE_POOL_SPARES * (uint64_t)SIZE + 1);
    tpr_base_pool_clear(&pool);
    check_all_given_back(&memory);
}

TEST(base_pool_allocates_nothing_once_warm) {
    tpr_base_memory memory = memory_of(UINT64_MAX);
    tpr_base_pool pool;
    void *a, *b;
    memset(&pool, 0, sizeof pool);
    pool.memory = &memory;
    a = tpr_base_pool_alloc(&pool, 100);
    tpr_base_pool_free(&pool, a, 100);
    hook("alloc", 0, ENOMEM);
    b = tpr_base_pool_alloc(&pool, 128);            /* of the same class */
    CHECK(a == b);
    CHECK(tpr_base_pool_alloc(&pool, 65) == NULL);
    CHECK(tpr_base_pool_alloc(&pool, 1 << 20) == NULL);
    unhook();
    tpr_base_pool_free(&pool, b, 70);
    tpr_base_pool_free(&pool, NULL, 70);
    tpr_base_pool_clear(&pool);
    check_all_given_back(&memory);
}

/* ---- map: against an array of what every key of a small universe holds ------------------------------------------- */

enum { KEYS = 3000 };
static uint64_t keys[KEYS];
static void *held[KEYS];

static void make_keys(int kind) {
    uint64_t golden = UINT64_C(0x9e3779b97f4a7c15), inverse = golden;
    for (int i = 0; i < 6; i++) inverse *= 2 - golden * inverse;
    REQUIRE(golden * inverse == 1);
    for (uint64_t i = 0; i < KEYS; i++) {
        uint64_t spread[] = {i, i << 32, ~i, i * inverse,              /* the last: all at the first place */
                             (UINT64_C(0xffffffff00000000) + i) * inverse,   /* all at the last: probes wrap round */
                             (UINT64_C(0xfffffff000000000) + (i << 32)) * inverse};
        keys[i] = spread[kind];
    }
}

static void map_against_reference(tpr_base_map *map, int operations, size_t universe) {
    uint32_t count = 0;
    memset(held, 0, sizeof held);
    for (int i = 0; i < operations; i++) {
        size_t at = (size_t)random_below(universe);
        void *value = (void *)&keys[random_below(KEYS)];
        bool grow = i / 2000 % 2 == 0;                                 /* fill and empty in turns */
        if (random_below(4) < (grow ? 3u : 1u)) {
            REQUIRE(tpr_base_map_put(map, keys[at], value));
            count += held[at] == NULL;
            held[at] = value;
        } else {
            REQUIRE(tpr_base_map_remove(map, keys[at]) == held[at]);
            count -= held[at] != NULL;
            held[at] = NULL;
        }
        at = (size_t)random_below(universe);
        REQUIRE(tpr_base_map_get(map, keys[at]) == held[at]);
        REQUIRE_EQ_INT(map->count, count);
        if (i % 500 == 0)
            for (size_t k = 0; k < universe; k++) REQUIRE(tpr_base_map_get(map, keys[k]) == held[k]);
    }
}

TEST(base_map_against_reference) {
    seed();
    for (int kind = 0; kind < 6; kind++) {
        bool collide = kind == 3 || kind == 4;
        tpr_base_memory memory = memory_of(UINT64_MAX);
        tpr_base_map map;
        memset(&map, 0, sizeof map);
        map.memory = &memory;
        make_keys(kind);
        map_against_reference(&map, 50000, 40);
        map_against_reference(&map, 0, 0);                             /* forgets; so must the map */
        tpr_base_map_clear(&map);
        check_all_given_back(&memory);
        map_against_reference(&map, collide ? 20000 : 100000, collide ? 300 : KEYS);
        tpr_base_map_clear(&map);
        check_all_given_back(&memory);
    }
}

TEST(base_map_without_memory) {
    tpr_base_memory memory = memory_of(UINT64_MAX);
    tpr_base_map map;
    memset(&map, 0, sizeof map);
    map.memory = &memory;
    CHECK(tpr_base_map_get(&map, 0) == NULL);
    CHECK(tpr_base_map_remove(&map, 0) == NULL);
    hook("alloc", 0, ENOMEM);
    CHECK(!tpr_base_map_put(&map, 0, &map));
    CHECK_EQ_INT(map.count, 0);
    hook("alloc", 1, ENOMEM);
    for (uint64_t i = 0; i < 12; i++) CHECK(tpr_base_map_put(&map, i, &keys[i]));
    CHECK(!tpr_base_map_put(&map, 12, &map));                          /* what it holds stays */
    CHECK_EQ_INT(map.count, 12);
    for (uint64_t i = 0; i < 12; i++) CHECK(tpr_base_map_get(&map, i) == &keys[i]);
    CHECK(tpr_base_map_get(&map, 12) == NULL);
    unhook();
    tpr_base_map_clear(&map);
    check_all_given_back(&memory);
}

/* ---- slab -------------------------------------------------------------------------------------------------------- */

typedef struct object { tpr_base_slot slot; uint64_t number; } object;

TEST(base_slab_against_reference) {
    enum { MOST = 1000 };
    static struct { object *at; uint32_t index, generation; uint64_t number; } taken[MOST], gone[MOST];
    tpr_base_memory memory = memory_of(UINT64_MAX);
    tpr_base_slab slab;
    size_t count = 0, gone_count = 0;
    seed();
    memset(&slab, 0, sizeof slab);
    slab.memory = &memory;
    slab.object_size = sizeof(object);
    slab.limit = MOST;
    for (uint64_t i = 1; i < 200000; i++) {
        if (random_below(2 + (i / 5000 % 2)) == 0 || count == 0) {
            object *o = (object *)tpr_base_slab_take(&slab);
            if (!o) {
                CHECK_EQ_INT(count, MOST);
                continue;
            }
            REQUIRE(count < MOST && o->slot.generation != 0);
            o->number = i;
            taken[count].at = o;
            taken[count].index = o->slot.index;
            taken[count].generation = o->slot.generation;
            taken[count++].number = i;
        } else {
            size_t at = (size_t)random_below(count);
            gone[gone_count++ % MOST] = taken[at];
            tpr_base_slab_give(&slab, &taken[at].at->slot);
            taken[at] = taken[--count];
        }
        REQUIRE_EQ_INT(slab.used, count);
        if (count) {
            size_t at = (size_t)random_below(count);
            tpr_base_slot *found = tpr_base_slab_find(&slab, taken[at].index, taken[at].generation);
            REQUIRE(found == &taken[at].at->slot);
            REQUIRE_EQ_INT(taken[at].at->number, taken[at].number);
            REQUIRE(tpr_base_slab_find(&slab, taken[at].index, taken[at].generation + 1) == NULL);
        }
        if (gone_count) {
            size_t at = (size_t)random_below(gone_count < MOST ? gone_count : MOST);
            REQUIRE(tpr_base_slab_find(&slab, gone[at].index, gone[at].generation) == NULL);
        }
    }
    CHECK(tpr_base_slab_find(&slab, slab.chunk_count * TPR_BASE_SLAB_CHUNK, 1) == NULL);
    CHECK(tpr_base_slab_find(&slab, UINT32_MAX, 1) == NULL);
    tpr_base_slab_clear(&slab);
    CHECK(tpr_base_slab_find(&slab, 0, 1) == NULL);
    check_all_given_back(&memory);
}

TEST(base_slab_generations_never_are_0) {
    tpr_base_memory memory = memory_of(UINT64_MAX);
    tpr_base_slab slab;
    tpr_base_slot *slot;
    memset(&slab, 0, sizeof slab);
    slab.memory = &memory;
    slab.object_size = sizeof(object);
    slab.limit = 1;
    slot = tpr_base_slab_take(&slab);
    REQUIRE(slot != NULL);
    CHECK_EQ_INT(slot->generation, 1);
    CHECK(tpr_base_slab_find(&slab, slot->index, 0) == NULL);
    CHECK(tpr_base_slab_take(&slab) == NULL);                          /* the limit */
    slot->generation = UINT32_MAX;
    tpr_base_slab_give(&slab, slot);
    CHECK_EQ_INT(slot->generation, 1);
    CHECK(tpr_base_slab_find(&slab, slot->index, 1) == NULL);          /* free */
    CHECK(tpr_base_slab_take(&slab) == slot);
    CHECK(tpr_base_slab_find(&slab, slot->index, 1) == slot);
    tpr_base_slab_clear(&slab);
    check_all_given_back(&memory);
}

TEST(base_slab_without_memory) {
    tpr_base_memory memory = memory_of(UINT64_MAX);
    tpr_base_slab slab;
    memset(&slab, 0, sizeof slab);
    slab.memory = &memory;
    slab.object_size = sizeof(object);
    slab.limit = UINT32_MAX;
    for (int n = 0; n < 40; n++) {         /* each allocation of the way to 20 chunks fails once: it goes on after */
        tpr_base_slot *slot;
        uint32_t used = slab.used;
        hook("alloc", 0, ENOMEM);
        slot = slab.free_head ? NULL : tpr_base_slab_take(&slab);
        CHECK(slot == NULL);
        hook("alloc", 1, ENOMEM);
        if (!slab.free_head) slot = tpr_base_slab_take(&slab);   /* the second allocation fails, if it needs two */
        unhook();
        CHECK_EQ_INT(slab.used, used + (slot != NULL));
        for (int i = 0; i < 32; i++) REQUIRE(tpr_base_slab_take(&slab) != NULL);
    }
    CHECK_EQ_INT(slab.chunk_count, (slab.used + TPR_BASE_SLAB_CHUNK - 1) / TPR_BASE_SLAB_CHUNK);
    tpr_base_slab_clear(&slab);
    check_all_given_back(&memory);
}

typedef struct watched { tpr_base_slot slot; uint64_t word; } watched;
enum { WATCHED = 200000 };             /* objects: the table of chunks grows eight times */

static void *peeks(void *arg) {
    const tpr_base_slab *slab = (const tpr_base_slab *)arg;
    uint32_t index = 0;
    for (uint64_t seen = 0; seen < WATCHED; index = index * 7919 + 1) {
        const watched *o = (const watched *)(const void *)tpr_base_slab_peek(slab, index % (WATCHED + 1000));
        const uint64_t word = o ? TPR_ATOMIC_LOAD(&o->word) : 0;
        if (word && word != index % (WATCHED + 1000) + 1) CHECK_EQ_INT(word, index % (WATCHED + 1000) + 1);
        o = (const watched *)(const void *)tpr_base_slab_peek(slab, WATCHED - 1);
        if (o) seen = TPR_ATOMIC_LOAD(&o->word);
    }
    return NULL;
}

TEST(base_slab_is_looked_at_while_it_grows) {
    tpr_base_memory memory = memory_of(UINT64_MAX);
    tpr_base_slab slab;
    pthread_t thread;
    memset(&slab, 0, sizeof slab);
    slab.memory = &memory;
    slab.object_size = sizeof(watched);
    slab.limit = UINT32_MAX;
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, peeks, &slab), 0);
    for (int i = 0; i < WATCHED; i++) {
        watched *o = (watched *)(void *)tpr_base_slab_take(&slab);
        REQUIRE(o != NULL);
        TPR_ATOMIC_STORE(&o->word, (uint64_t)o->slot.index + 1);
    }
    pthread_join(thread, NULL);
    tpr_base_slab_clear(&slab);
    check_all_given_back(&memory);
}

/* ---- lists, bytes ------------------------------------------------------------------------------------------------ */

TEST(base_list) {
    tpr_base_list head, nodes[3];
    int n = 0;
    tpr_base_list_init(&head);
    CHECK(tpr_base_list_empty(&head));
    for (int i = 0; i < 3; i++) tpr_base_list_add(&head, &nodes[i]);
    CHECK(!tpr_base_list_empty(&head));
    for (tpr_base_list *i = head.next; i != &head; i = i->next) CHECK(i == &nodes[n++]);
    CHECK_EQ_INT(n, 3);
    tpr_base_list_remove(&nodes[1]);
    tpr_base_list_remove(&nodes[1]);       /* it is in no list now: nothing */
    CHECK(head.next == &nodes[0] && nodes[0].next == &nodes[2] && head.prev == &nodes[2]);
    tpr_base_list_remove(&nodes[0]);
    tpr_base_list_remove(&nodes[2]);
    CHECK(tpr_base_list_empty(&head));
}

TEST(base_byte_order) {
    uint8_t bytes[9] = {0x5a, 1, 2, 3, 4, 5, 6, 7, 0xf8}, out[9] = {0x5a};   /* from the second on: off any alignment */
    CHECK(tpr_base_load_le16(bytes + 1) == 0x0201);
    CHECK(tpr_base_load_le32(bytes + 1) == 0x04030201u);
    CHECK(tpr_base_load_le64(bytes + 1) == UINT64_C(0xf807060504030201));
    tpr_base_store_le64(out + 1, UINT64_C(0xf807060504030201));
    CHECK_MEM(out, bytes, 9);
    tpr_base_store_le32(out + 1, 0xfffefdfcu);
    tpr_base_store_le16(out + 5, 0xfbfa);
    CHECK(tpr_base_load_le32(out + 1) == 0xfffefdfcu && tpr_base_load_le16(out + 5) == 0xfbfa);
    CHECK(out[0] == 0x5a && out[7] == 7);
    tpr_base_copy(NULL, NULL, 0);
    tpr_base_copy(out, bytes + 1, 3);
    CHECK_MEM(out, bytes + 1, 3);
    CHECK(tpr_base_bytes_none().data == NULL && tpr_base_bytes_none().size == 0);
}

/* ---- names ------------------------------------------------------------------------------------------------------- */

static size_t utf8_encode(uint32_t c, uint8_t *out) {
    if (c < 0x80) { out[0] = (uint8_t)c; return 1; }
    if (c < 0x800) { out[0] = (uint8_t)(0xc0 | c >> 6); out[1] = (uint8_t)(0x80 | (c & 63)); return 2; }
    if (c < 0x10000) {
        out[0] = (uint8_t)(0xe0 | c >> 12);
        out[1] = (uint8_t)(0x80 | (c >> 6 & 63));
        out[2] = (uint8_t)(0x80 | (c & 63));
        return 3;
    }
    out[0] = (uint8_t)(0xf0 | c >> 18);
    out[1] = (uint8_t)(0x80 | (c >> 12 & 63));
    out[2] = (uint8_t)(0x80 | (c >> 6 & 63));
    out[3] = (uint8_t)(0x80 | (c & 63));
    return 4;
}

/* The lengths of all sequences of up to three bytes, by encoding every character there is. */
TEST(base_utf8) {
    static uint8_t lengths[1 << 24];
    uint8_t p[4];
    size_t characters = 0;
    for (uint32_t c = 0; c < 0x110000; c++) {
        size_t n = utf8_encode(c, p);
        bool surrogate = c >= 0xd800 && c < 0xe000;
        REQUIRE_EQ_INT(tpr_base_utf8_length(p, n), surrogate ? 0 : n);
        for (size_t left = 1; left < n; left++) REQUIRE_EQ_INT(tpr_base_utf8_length(p, left), 0);
        for (uint32_t i = 0; n < 4 && !surrogate && i < 1u << (8 * (3 - n)); i++)
            lengths[(size_t)p[0] << 16 | (n > 1 ? (size_t)p[1] << 8 : (size_t)(i >> 8 << 8)) |
                    (n > 2 ? (size_t)p[2] : (size_t)(i & 0xff))] = (uint8_t)n;
        characters++;
    }
    CHECK_EQ_INT(characters, 0x110000);
    p[3] = 'x';
    for (size_t i = 0; i < sizeof lengths; i++) {
        p[0] = (uint8_t)(i >> 16);
        p[1] = (uint8_t)(i >> 8);
        p[2] = (uint8_t)i;
        REQUIRE_EQ_INT(tpr_base_utf8_length(p, 3), lengths[i]);
    }
    for (uint32_t i = 0; i < 1u << 20; i++) {   /* four bytes: all of the first two, the edges of the others */
        static const uint8_t edges[] = {0x00, 0x7f, 0x80, 0xbf};
        uint32_t c;
        bool valid;
        p[0] = (uint8_t)(i >> 12);
        p[1] = (uint8_t)(i >> 4);
        p[2] = edges[i >> 2 & 3];
        p[3] = edges[i & 3];
        if (p[0] < 0xf0) continue;
        c = (uint32_t)(p[0] & 15) << 18 | (uint32_t)(p[1] & 63) << 12 | (uint32_t)(p[2] & 63) << 6 | (p[3] & 63);
        valid = p[0] < 0xf8 && p[1] >> 6 == 2 && p[2] >> 6 == 2 && p[3] >> 6 == 2 && c >= 0x10000 && c < 0x110000;
        REQUIRE_EQ_INT(tpr_base_utf8_length(p, 4), valid ? 4 : 0);
    }
}

static const char *fault(const char *name) { return tpr_base_name_fault(name, name ? strlen(name) : 0, 8); }

TEST(base_names) {
    CHECK_STR(fault(NULL), "is empty");
    CHECK_STR(fault(""), "is empty");
    CHECK_STR(tpr_base_name_fault(NULL, 5, 8), "is empty");
    CHECK(fault("a") == NULL);
    CHECK(fault("worker 8") == NULL);
    CHECK_STR(fault("worker 10"), "is too long");
    CHECK(fault("gr\xc3\xb6\xc3\x9f" "e") == NULL);
    CHECK(fault("\xf0\x9f\x8c\x8a\xe2\x82\xac~") == NULL);
    CHECK_STR(fault("caf\xe9"), "is not UTF-8");
    CHECK_STR(tpr_base_name_fault("caf\xc3\xa9", 4, 8), "is not UTF-8");     /* cut within a character */
    CHECK_STR(fault("\xed\xa0\x80"), "is not UTF-8");
    CHECK_STR(fault("\xc0\x80"), "is not UTF-8");
    CHECK_STR(fault("a\nb"), "has a control character");
    CHECK_STR(fault("\x7f"), "has a control character");
    CHECK_STR(tpr_base_name_fault("a\0b", 3, 8), "has a control character");
}

TEST(base_lists_of_names) {
    uint32_t rank = 77;
    CHECK(!tpr_base_list_names("", "shm", &rank));
    CHECK(!tpr_base_list_names("shmx,xshm,sh,shm ", "shm", &rank));
    CHECK_EQ_INT(rank, 77);
    CHECK(tpr_base_list_names("shm", "shm", &rank) && rank == 0);
    CHECK(tpr_base_list_names("shm,tcp,ibv", "shm", &rank) && rank == 0);
    CHECK(tpr_base_list_names("shm,tcp,ibv", "tcp", &rank) && rank == 1);
    CHECK(tpr_base_list_names("shm,tcp,ibv", "ibv", &rank) && rank == 2);
    CHECK(tpr_base_list_names("shm,,tcp,", "tcp", &rank) && rank == 2);
    CHECK(tpr_base_list_names("tcp,tcp", "tcp", &rank) && rank == 0);
    CHECK(tpr_base_list_names("shm,tcp", "tcp", NULL));
    CHECK(!tpr_base_list_names(",", "tcp", NULL));
    CHECK(tpr_base_starts_with("tcp://x", "tcp://") && tpr_base_starts_with("x", ""));
    CHECK(!tpr_base_starts_with("tc", "tcp"));
}

/* ---- errors ------------------------------------------------------------------------------------------------------ */

TEST(base_errors) {
    tprpc_error error;
    char text[600];
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = 0;
    memset(&error, 0x5a, sizeof error);
    CHECK_EQ_INT(tprpc_error_set(&error, TPRPC_ERROR_PEER, 104, "%s and %d", "one", 2), TPRPC_ERROR_PEER);
    CHECK_EQ_INT(error.status, TPRPC_ERROR_PEER);
    CHECK_EQ_INT(error.os_code, 104);
    CHECK_EQ_INT(error.user_code, 0);
    CHECK_STR(error.text, "one and 2");
    CHECK_EQ_INT(tprpc_error_set(NULL, TPRPC_ERROR_LIMIT, 0, "%s", text), TPRPC_ERROR_LIMIT);
    for (size_t n = sizeof error.text - 3; n < sizeof error.text + 3; n++) {
        struct { tprpc_error error; char after[8]; } guarded;
        memset(&guarded, 0x5a, sizeof guarded);
        tprpc_error_set(&guarded.error, TPRPC_ERROR_LIMIT, 0, "%.*s", (int)n, text);
        CHECK_EQ_INT(strlen(guarded.error.text), n < sizeof error.text ? n : sizeof error.text - 1);
        CHECK_EQ_INT(guarded.after[0], 0x5a);
    }
    CHECK_EQ_INT(tpr_base_os_error(&error, ECONNREFUSED, "connecting", "to nobody"), TPRPC_ERROR_UNREACHABLE);
    CHECK_EQ_INT(error.os_code, ECONNREFUSED);
    CHECK_STR(error.text, "connecting to nobody: Connection refused");
    CHECK_EQ_INT(tpr_base_status_of(ENOMEM), TPRPC_ERROR_MEMORY);
    CHECK_EQ_INT(tpr_base_status_of(EMFILE), TPRPC_ERROR_LIMIT);
    CHECK_EQ_INT(tpr_base_status_of(EPERM), TPRPC_ERROR_DENIED);
    CHECK_EQ_INT(tpr_base_status_of(ECONNRESET), TPRPC_ERROR_PEER);
    CHECK_EQ_INT(tpr_base_status_of(EIO), TPRPC_ERROR_SYSTEM);
}

TEST(base_status_names) {
    for (int i = 0; i <= TPRPC_ERROR_SYSTEM; i++) {
        const char *name = tprpc_status_name((tprpc_status)i);
        CHECK(name && name[0] && strcmp(name, "unknown") != 0);
        for (int k = 0; k < i; k++) CHECK(strcmp(name, tprpc_status_name((tprpc_status)k)) != 0);
    }
    CHECK_STR(tprpc_status_name(TPRPC_OK), "ok");
    CHECK_STR(tprpc_status_name(TPRPC_ERROR_NO_WORKER), "no_worker");
    CHECK_STR(tprpc_status_name(TPRPC_ERROR_SYSTEM), "system");
    CHECK_STR(tprpc_status_name((tprpc_status)(TPRPC_ERROR_SYSTEM + 1)), "unknown");
    CHECK_EQ_INT(tprpc_version(), TPRPC_VERSION);
}

/* ---- log --------------------------------------------------------------------------------------------------------- */

typedef struct seen { int count, again; tprpc_log last; char text[300], peer[100], section[16]; tpr_base_logger *logger; } seen;

static void on_log(const tprpc_log *entry, void *user) {
    seen *s = (seen *)user;
    int number = -1;
    if (sscanf(entry->text, "line %d", &number) == 1) CHECK_EQ_INT(number, s->count);
    s->count++;
    s->last = *entry;
    snprintf(s->text, sizeof s->text, "%s", entry->text);
    snprintf(s->peer, sizeof s->peer, "%s", entry->peer);
    snprintf(s->section, sizeof s->section, "%s", entry->section);
    CHECK(tpr_os_trylock(&s->logger->lock));           /* no lock is held here */
    tpr_os_lock_give(&s->logger->lock);
    if (s->again > 0) {                                /* a log that makes a line: handed on in its turn */
        s->again--;
        TPR_LOG(s->logger, TPRPC_LOG_INFO, "test", NULL, "line %d", s->count);
        tpr_base_log_flush(s->logger);
    }
}

static tpr_base_log_line log_lines[TPR_BASE_LOG_LINES];

static tpr_base_logger logger_of(seen *s) {
    tpr_base_logger logger;
    memset(&logger, 0, sizeof logger);
    logger.log = on_log;
    logger.user = s;
    logger.lines = log_lines;
    memset(s, 0, sizeof *s);
    return logger;
}

TEST(base_log_order_and_drops) {
    seen s;
    tpr_base_logger logger = logger_of(&s);
    s.logger = &logger;
    for (int round = 0; round < 5; round++) {          /* the ring's end is passed */
        int lines = 1 + round * 13;
        s.count = 0;
        for (int i = 0; i < lines; i++) TPR_LOG(&logger, TPRPC_LOG_INFO, "test", "peer", "line %d", i);
        CHECK_EQ_INT(s.count, 0);
        tpr_base_log_flush(&logger);
        CHECK_EQ_INT(s.count, lines);
    }
    s.count = 0;
    for (int i = 0; i < TPR_BASE_LOG_LINES + 9; i++) TPR_LOG(&logger, TPRPC_LOG_INFO, "test", "peer", "line %d", i);
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(s.count, TPR_BASE_LOG_LINES + 1);     /* the oldest are kept; a last line tells of the rest */
    CHECK_CONTAINS(s.text, "9 lines were dropped");
    CHECK_STR(s.section, "log");
    CHECK_STR(s.peer, "");
    CHECK_EQ_INT(s.last.level, TPRPC_LOG_WARNING);
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(s.count, TPR_BASE_LOG_LINES + 1);     /* and tells once */
    TPR_LOG(&logger, TPRPC_LOG_INFO, "test", "peer", "last");
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(s.count, TPR_BASE_LOG_LINES + 2);
    logger.head = logger.tail = UINT32_MAX - 5;        /* the counters pass their end */
    s.count = 0;
    for (int i = 0; i < 20; i++) TPR_LOG(&logger, TPRPC_LOG_INFO, "test", "peer", "line %d", i);
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(s.count, 20);
}

TEST(base_log_lines) {
    seen s;
    tpr_base_logger logger = logger_of(&s);
    uint32_t id;
    char text[400];
    s.logger = &logger;
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = 0;
    TPR_LOG(&logger, TPRPC_LOG_WARNING, "shm", "process 7", "%d of %s", 5, "ten"); id = __LINE__;
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(s.last.level, TPRPC_LOG_WARNING);
    CHECK_EQ_INT(s.last.line, id);
    CHECK_CONTAINS(s.last.file, "in_base.c");
    CHECK_STR(s.section, "shm");
    CHECK_STR(s.peer, "process 7");
    CHECK_STR(s.text, "5 of ten");
    id = s.last.id;
    TPR_LOG(&logger, TPRPC_LOG_ERROR, "tcp", NULL, "%d of %s", 6, "eleven");
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(s.last.id, id);                       /* the message's, whatever is in it */
    CHECK_STR(s.peer, "");
    TPR_LOG(&logger, TPRPC_LOG_PANIC, "tcp", text, "%s", text);
    tpr_base_log_flush(&logger);
    CHECK(s.last.id != id);
    CHECK_EQ_INT(strlen(s.text), TPR_BASE_LOG_TEXT - 1);
    CHECK_EQ_INT(strlen(s.peer), sizeof log_lines[0].peer - 1);
    CHECK_EQ_INT(s.count, 3);
    s.count = 0;
    s.again = 200;                                     /* more than the ring holds, one at a time */
    TPR_LOG(&logger, TPRPC_LOG_INFO, "test", NULL, "line %d", 0);
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(s.count, 201);
    CHECK_EQ_INT(logger.dropped, 0);
}

static int evaluated;
static int evaluate(void) { return ++evaluated; }

TEST(base_log_levels) {
    seen s;
    tpr_base_logger logger = logger_of(&s);
    s.logger = &logger;
    for (int32_t level = TPRPC_LOG_PANIC; level <= TPRPC_LOG_DEBUG; level++)
        TPR_LOG(&logger, level, "test", NULL, "number %d", evaluate());
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(s.count, TPRPC_LOG_LEVEL + 1);        /* above it nothing is kept, nor its arguments looked at */
    CHECK_EQ_INT(evaluated, TPRPC_LOG_LEVEL + 1);
    logger.log = NULL;                                 /* silent, and without memory for it */
    logger.lines = NULL;
    TPR_LOG(&logger, TPRPC_LOG_PANIC, "test", NULL, "number %d", evaluate());
    tpr_base_log_flush(&logger);
    CHECK_EQ_INT(logger.head, logger.tail);
}

enum { LOG_LINES_EACH = 20000 };
static int log_got, log_lost, log_last[THREADS], log_begun, log_ended;

static void on_thread_log(const tprpc_log *entry, void *user) {
    int thread = -1, number = -1;
    (void)user;
    if (sscanf(entry->text, "%d lines were dropped", &number) == 1) {
        CHECK(number > 0);
        log_lost += number;
        return;
    }
    REQUIRE(sscanf(entry->text, "thread %d line %d", &thread, &number) == 2 && thread >= 0 && thread < THREADS);
    CHECK(number > log_last[thread]);
    log_last[thread] = number;
    log_got++;
}

static void log_thread(void *arg) {
    int thread = __sync_fetch_and_add(&log_begun, 1);
    for (int i = 1; i <= LOG_LINES_EACH; i++)
        TPR_LOG((tpr_base_logger *)arg, TPRPC_LOG_INFO, "test", "peer", "thread %d line %d", thread, i);
    __sync_fetch_and_add(&log_ended, 1);
}

TEST(base_log_of_many_threads) {
    seen s;
    tpr_base_logger logger = logger_of(&s);
    tpr_os_thread threads[THREADS];
    logger.log = on_thread_log;
    for (int i = 0; i < THREADS; i++) REQUIRE_EQ_INT(tpr_os_thread_start(&threads[i], log_thread, &logger), 0);
    while (__sync_fetch_and_add(&log_ended, 0) < THREADS) tpr_base_log_flush(&logger);
    for (int i = 0; i < THREADS; i++) tpr_os_thread_join(&threads[i]);
    tpr_base_log_flush(&logger);
    CHECK(log_got > 0);
    CHECK_EQ_INT(log_got + log_lost, THREADS * LOG_LINES_EACH);
}

/* ---- os: locks, threads, time ------------------------------------------------------------------------------------ */

typedef struct counted { tpr_os_lock lock; int64_t count; int tries; } counted;

static void lock_thread(void *arg) {
    counted *c = (counted *)arg;
    for (int i = 0; i < 100000 / TEST_SLOWDOWN; i++) {
        if (i % 3 == 0 && !tpr_os_trylock(&c->lock)) {
            __sync_fetch_and_add(&c->tries, 1);
            tpr_os_lock_take(&c->lock);
        } else if (i % 3 != 0) {
            tpr_os_lock_take(&c->lock);
        }
        c->count++;                        /* plain: the thread sanitizer sees where the lock does not hold */
        if (i % 1000 == 0) test_sleep_us(50);
        tpr_os_lock_give(&c->lock);
    }
}

TEST(os_lock) {
    counted c;
    memset(&c, 0, sizeof c);
    CHECK(tpr_os_trylock(&c.lock));
    CHECK(!tpr_os_trylock(&c.lock));
    tpr_os_lock_give(&c.lock);
    run_threads(lock_thread, &c);
    CHECK_EQ_INT(c.count, THREADS * (100000 / TEST_SLOWDOWN));
    CHECK_EQ_INT(c.lock.state, 0);
    hook("futex_wait", 0, EINTR);          /* waits that end early do no harm */
    run_threads(lock_thread, &c);
    unhook();
    CHECK_EQ_INT(c.count, 2 * THREADS * (100000 / TEST_SLOWDOWN));
}

static void wait_thread(void *arg) {       /* its lock is given when the test has seen it wait */
    counted *c = (counted *)arg;
    tpr_os_lock_take(&c->lock);
    c->count++;
    tpr_os_lock_give(&c->lock);
}

TEST(os_lock_wakes_who_sleeps) {
    counted c;
    tpr_os_thread thread;
    memset(&c, 0, sizeof c);
    tpr_os_lock_take(&c.lock);
    REQUIRE_EQ_INT(tpr_os_thread_start(&thread, wait_thread, &c), 0);
    while (TPR_ATOMIC_LOAD(&c.lock.state) != 2) test_sleep_us(100);
    test_sleep_us(20000);
    tpr_os_lock_give(&c.lock);
    tpr_os_thread_join(&thread);
    CHECK_EQ_INT(c.count, 1);
}

TEST(os_futex_timeout) {
    uint32_t word = 5;
    int64_t begin = tpr_os_now_us();
    CHECK_EQ_INT(tpr_os_futex_wait(&word, 5, 20000), -1);
    CHECK_EQ_INT(errno, ETIMEDOUT);
    CHECK(tpr_os_now_us() - begin >= 20000);
    CHECK_EQ_INT(tpr_os_futex_wait(&word, 6, -1), -1);     /* the word is another: no wait */
    CHECK_EQ_INT(errno, EAGAIN);
}

static uintptr_t thread_ids[THREADS];
static int thread_count;
static void id_thread(void *arg) {
    (void)arg;
    int at = __sync_fetch_and_add(&thread_count, 1);
    thread_ids[at] = tpr_os_thread_id();
    while (__sync_fetch_and_add(&thread_count, 0) < THREADS) test_sleep_us(100);   /* all live at once */
    CHECK(thread_ids[at] == tpr_os_thread_id());
}

TEST(os_thread_ids_differ) {
    run_threads(id_thread, NULL);
    for (int i = 0; i < THREADS; i++) {
        CHECK(thread_ids[i] != tpr_os_thread_id());
        for (int k = 0; k < i; k++) CHECK(thread_ids[i] != thread_ids[k]);
    }
    hook("pthread_create", 0, EAGAIN);
    tpr_os_thread thread;
    CHECK_EQ_INT(tpr_os_thread_start(&thread, id_thread, NULL), -1);
    CHECK_EQ_INT(errno, EAGAIN);
}

/* ---- os: the process --------------------------------------------------------------------------------------------- */

static void fork_page_child(void *arg) {
    uint32_t *page = (uint32_t *)arg;
    CHECK_EQ_INT(*page, 0);
    CHECK_EQ_INT(page[1023], 0);
    *page = 9;                             /* the child's own */
}

TEST(os_fork_page) {
    uint32_t *page = tpr_os_fork_page();
    REQUIRE(page != NULL);
    CHECK_EQ_INT(*page, 0);
    *page = 1;
    page[1023] = 7;
    CHECK_EQ_INT(test_wait_child(test_fork_run(fork_page_child, page), 10), 0);
    CHECK_EQ_INT(*page, 1);
    CHECK_EQ_INT(page[1023], 7);
    tpr_os_fork_page_free(page);
    tpr_os_fork_page_free(NULL);
    hook("madvise", 0, EINVAL);            /* an old kernel */
    CHECK(tpr_os_fork_page() == NULL);
    hook("mmap", 0, ENOMEM);
    CHECK(tpr_os_fork_page() == NULL);
}


TEST(os_process) {
    uint8_t a[64], b[64];
    char boot[64], again[64], small[10];
    REQUIRE(tpr_os_random(a, sizeof a) == 0 && tpr_os_random(b, sizeof b) == 0);
    CHECK(memcmp(a, b, sizeof a) != 0);
    hook("getrandom", 0, ENOSYS);
    CHECK_EQ_INT(tpr_os_random(a, sizeof a), -1);
    unhook();
    CHECK_EQ_INT(tpr_os_user(), geteuid());
    CHECK_EQ_INT(tpr_os_pid(), getpid());
    tpr_os_boot_id(boot, sizeof boot);
    tpr_os_boot_id(again, sizeof again);
    CHECK_STR(boot, again);
    CHECK_EQ_INT(strlen(boot), 36);
    tpr_os_boot_id(small, sizeof small);
    CHECK(strlen(small) == 9 && memcmp(small, boot, 9) == 0);
    hook("open", 0, EACCES);               /* no /proc: the host's name */
    tpr_os_boot_id(again, sizeof again);
    unhook();
    CHECK(again[0] && strlen(again) <= 36);
    CHECK(tpr_os_net_namespace() == tpr_os_net_namespace());
    setenv("TPRPC_TEST_BASE", "yes", 1);
    CHECK_STR(tpr_os_env("TPRPC_TEST_BASE"), "yes");
    CHECK(tpr_os_env("TPRPC_TEST_BASE_NOT") == NULL);
}

/* ---- os: shared memory ------------------------------------------------------------------------------------------- */

static int raw_memfd(unsigned flags, size_t size, int seals) {
    int fd = memfd_create("test", flags);
    if (fd < 0) return -1;
    if (ftruncate(fd, (off_t)size) != 0 || (seals && fcntl(fd, F_ADD_SEALS, seals) != 0)) {
        close(fd);
        return -1;
    }
    return fd;
}

static void check_refused(int fd, size_t size) {
    errno = 0;
    CHECK_EQ_INT(tpr_os_memfd_check(fd, size), -1);
    CHECK_EQ_INT(errno, EPERM);
    tpr_os_close(fd);
}

TEST(os_memfd) {
    int fds = test_count_fds(), fd = tpr_os_memfd("test", 8192);
    uint8_t *a, *b;
    REQUIRE(fd >= 0);
    CHECK_EQ_INT(tpr_os_memfd_check(fd, 8192), 0);
    CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    CHECK(ftruncate(fd, 4096) == -1 && errno == EPERM);
    CHECK(ftruncate(fd, 16384) == -1 && errno == EPERM);
    CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) == -1 && errno == EPERM);
    a = (uint8_t *)tpr_os_map(fd, 8192);
    b = (uint8_t *)tpr_os_map(fd, 8192);
    REQUIRE(a && b && a != b);
    a[5000] = 17;
    CHECK_EQ_INT(b[5000], 17);
    tpr_os_unmap(a, 8192);
    tpr_os_unmap(b, 8192);
    tpr_os_unmap(NULL, 8192);
    tpr_os_close(fd);
    tpr_os_close(-1);
    CHECK_EQ_INT(test_count_fds(), fds);
}

TEST(os_memfd_of_wrong_size_or_without_seals_is_refused) {
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    char path[300];
    int fds = test_count_fds(), ends[2];
    check_refused(tpr_os_memfd("test", 8192), 4096);
    check_refused(tpr_os_memfd("test", 8192), 8191);
    check_refused(tpr_os_memfd("test", 8192), 8193);
    check_refused(tpr_os_memfd("test", 8192), 0);
    check_refused(tpr_os_memfd("test", 8192), SIZE_MAX);
    check_refused(raw_memfd(flags, 8192, 0), 8192);
    check_refused(raw_memfd(flags, 8192, F_SEAL_SHRINK), 8192);
    check_refused(raw_memfd(flags, 8192, F_SEAL_SHRINK | F_SEAL_GROW), 8192);
    check_refused(raw_memfd(flags, 8192, F_SEAL_SHRINK | F_SEAL_SEAL), 8192);
    check_refused(raw_memfd(flags, 8192, F_SEAL_GROW | F_SEAL_SEAL), 8192);
    check_refused(raw_memfd(MFD_CLOEXEC, 8192, 0), 8192);          /* born with the seal against seals alone */
    check_refused(open(test_temp_path(path, sizeof path), O_RDWR | O_CREAT | O_CLOEXEC, 0600), 0);
    check_refused(open("/dev/zero", O_RDWR | O_CLOEXEC), 0);
    REQUIRE_EQ_INT(pipe(ends), 0);
    check_refused(ends[0], 0);
    tpr_os_close(ends[1]);
    CHECK_EQ_INT(tpr_os_memfd_check(-1, 0), -1);
    CHECK_EQ_INT(test_count_fds(), fds);
}

static int pretend_huge_pages(const char *call, int64_t *size) {
    if (strcmp(call, "fstatfs_type") == 0) *size = HUGETLBFS_MAGIC;
    return 0;
}

/* Pages of a hugetlb file can be taken away under the seals, and a look at one is then a SIGBUS. */
TEST(os_memfd_of_huge_pages_is_refused) {
    size_t size = 2 << 20;
    int fd = raw_memfd(MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB, size, TPR_OS_SEALS);
    if (fd >= 0) check_refused(fd, size);
    fd = tpr_os_memfd("test", size);   /* few machines have huge pages to spare: this one is said to be of them */
    CHECK_EQ_INT(tpr_os_memfd_check(fd, size), 0);
    TPR_ATOMIC_STORE(&tprpc_test_hook, pretend_huge_pages);
    check_refused(fd, size);
    unhook();
}

TEST(os_memfd_failures_leave_no_descriptor) {
    static const char *const calls[] = {"memfd_create", "ftruncate", "fcntl"};
    int fds = test_count_fds();
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        hook(calls[i], 0, ENOSPC);
        CHECK_EQ_INT(tpr_os_memfd("test", 4096), -1);
        CHECK_EQ_INT(errno, ENOSPC);
        CHECK_EQ_INT(calls_seen, 1);
    }
    unhook();
    CHECK_EQ_INT(test_count_fds(), fds);
}

/* ---- os: addresses ----------------------------------------------------------------------------------------------- */

TEST(os_addresses_there_and_back) {
    static const struct { const char *host; uint16_t port; const char *text, *bare; bool loopback; } known[] = {
        {"127.0.0.1", 80, "127.0.0.1:80", "127.0.0.1", true},
        {"127.255.255.254", 0, "127.255.255.254:0", "127.255.255.254", true},
        {"128.0.0.1", 65535, "128.0.0.1:65535", "128.0.0.1", false},
        {"0.0.0.0", 1, "0.0.0.0:1", "0.0.0.0", false},
        {"::1", 7000, "[::1]:7000", "::1", true},
        {"::", 9, "[::]:9", "::", false},
        {"2001:db8::5", 443, "[2001:db8::5]:443", "2001:db8::5", false},
        {"::ffff:127.0.0.1", 80, "[::ffff:127.0.0.1]:80", "::ffff:127.0.0.1", true},
        {"::ffff:128.0.0.1", 80, "[::ffff:128.0.0.1]:80", "::ffff:128.0.0.1", false}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        tpr_os_address address, again;
        char text[80], bare[80], cut[8];
        CHECK(tpr_os_resolve(known[i].host, known[i].port, &address) == NULL);
        tpr_os_address_text(&address, true, text, sizeof text);
        tpr_os_address_text(&address, false, bare, sizeof bare);
        CHECK_STR(text, known[i].text);
        CHECK_STR(bare, known[i].bare);
        CHECK(tpr_os_is_loopback(&address) == known[i].loopback);
        CHECK(tpr_os_resolve(bare, known[i].port, &again) == NULL);
        CHECK_EQ_INT(again.size, address.size);
        CHECK_MEM(&again.at, &address.at, address.size);
        tpr_os_address_text(&address, true, cut, sizeof cut);
        CHECK(strlen(cut) < sizeof cut && memcmp(cut, text, strlen(cut)) == 0);
    }
}

TEST(os_addresses_random) {
    seed();
    for (int i = 0; i < 2000; i++) {
        tpr_os_address address, again;
        char text[80];
        memset(&address, 0, sizeof address);
        if (i % 2) {
            struct sockaddr_in in;
            memset(&in, 0, sizeof in);
            in.sin_family = AF_INET;
            in.sin_port = htons((uint16_t)i);
            in.sin_addr.s_addr = (uint32_t)random_u64();
            memcpy(&address.at, &in, sizeof in);
            address.size = sizeof in;
        } else {
            struct sockaddr_in6 in6;
            memset(&in6, 0, sizeof in6);
            in6.sin6_family = AF_INET6;
            in6.sin6_port = htons((uint16_t)i);
            for (int k = 0; k < 16; k++) in6.sin6_addr.s6_addr[k] = (uint8_t)(random_below(2) ? random_u64() : 0);
            memcpy(&address.at, &in6, sizeof in6);
            address.size = sizeof in6;
        }
        tpr_os_address_text(&address, false, text, sizeof text);
        REQUIRE(tpr_os_resolve(text, (uint16_t)i, &again) == NULL);
        REQUIRE_EQ_INT(again.size, address.size);
        REQUIRE_MEM(&again.at, &address.at, address.size);
    }
}

TEST(os_resolve) {
    tpr_os_address address;
    const char *why;
    CHECK(tpr_os_resolve("", 80, &address) == NULL);       /* nothing: any address */
    CHECK(tpr_os_resolve("localhost", 80, &address) == NULL && tpr_os_is_loopback(&address));
    why = tpr_os_resolve("no such host !", 80, &address);
    CHECK(why && why[0]);
    hook("getaddrinfo", 0, ENOMEM);
    CHECK_STR(tpr_os_resolve("localhost", 80, &address), "Cannot allocate memory");
}

TEST(os_route_and_interface) {
    tpr_os_address to, from;
    char text[80];
    REQUIRE(tpr_os_resolve("127.0.0.1", 80, &to) == NULL);
    REQUIRE_EQ_INT(tpr_os_route(&to, &from), 0);
    tpr_os_address_text(&from, true, text, sizeof text);
    CHECK_STR(text, "127.0.0.1:0");
    REQUIRE_EQ_INT(tpr_os_interface("lo", &from), 0);
    tpr_os_address_text(&from, true, text, sizeof text);
    CHECK_STR(text, "127.0.0.1:0");
    CHECK_EQ_INT(tpr_os_interface("nothing0", &from), -1);
    CHECK_EQ_INT(errno, ENODEV);
}

TEST(os_unix_addresses) {
    char name[200];
    tpr_os_address address;
    memset(name, 'n', sizeof name);
    name[106] = 0;
    REQUIRE_EQ_INT(tpr_os_unix_address(name, &address), 0);
    CHECK_EQ_INT(address.size, offsetof(struct sockaddr_un, sun_path) + 107);
    int a = tpr_os_socket(AF_UNIX), b = tpr_os_socket(AF_UNIX), c, d;
    int32_t pid = 0;
    uint32_t user = 77;
    REQUIRE(a >= 0 && b >= 0);
    CHECK(fcntl(a, F_GETFD) & FD_CLOEXEC && fcntl(a, F_GETFL) & O_NONBLOCK);
    REQUIRE_EQ_INT(tpr_os_listen(a, &address), 0);
    REQUIRE_EQ_INT(tpr_os_connect(b, &address), 0);
    c = tpr_os_accept(a);
    REQUIRE(c >= 0);
    CHECK(fcntl(c, F_GETFD) & FD_CLOEXEC && fcntl(c, F_GETFL) & O_NONBLOCK);
    REQUIRE_EQ_INT(tpr_os_credentials(c, &pid, &user), 0);
    CHECK_EQ_INT(pid, getpid());
    CHECK_EQ_INT(user, geteuid());
    CHECK_EQ_INT(tpr_os_accept(a), -1);
    CHECK_EQ_INT(errno, EAGAIN);
    d = tpr_os_socket(AF_UNIX);
    CHECK_EQ_INT(tpr_os_listen(d, &address), -1);
    CHECK_EQ_INT(errno, EADDRINUSE);
    tpr_os_close(a);
    tpr_os_close(b);
    tpr_os_close(c);
    tpr_os_close(d);
    name[106] = 'n';
    name[107] = 0;
    CHECK_EQ_INT(tpr_os_unix_address(name, &address), -1);
    CHECK_EQ_INT(tpr_os_unix_address("", &address), -1);
    CHECK_EQ_INT(errno, ENAMETOOLONG);
}

/* ---- os: spans, sending, receiving ------------------------------------------------------------------------------- */

TEST(os_spans) {
    tprpc_span spans[20];
    struct iovec iov[TPR_OS_SPANS + 1];
    char bytes[64];
    for (size_t i = 0; i < 20; i++) {
        spans[i].data = bytes + i;
        spans[i].size = i % 5 == 2 ? 0 : i + 1;
    }
    memset(iov, 0x5a, sizeof iov);
    CHECK_EQ_INT(tpr_os_spans(spans, 20, iov, INT64_MAX), TPR_OS_SPANS);         /* 20 with 4 empty ones */
    CHECK(iov[0].iov_base == bytes && iov[0].iov_len == 1);
    CHECK(iov[2].iov_base == bytes + 3 && iov[2].iov_len == 4);
    CHECK(iov[15].iov_base == bytes + 19 && iov[15].iov_len == 20);
    CHECK(iov[16].iov_len == (size_t)0x5a5a5a5a5a5a5a5a);
    for (size_t i = 0; i < 20; i++) spans[i].size = 10;
    CHECK_EQ_INT(tpr_os_spans(spans, 20, iov, INT64_MAX), TPR_OS_SPANS);         /* the rest waits */
    CHECK(iov[15].iov_base == bytes + 15 && iov[16].iov_len == (size_t)0x5a5a5a5a5a5a5a5a);
    CHECK_EQ_INT(tpr_os_spans(spans, 3, iov, INT64_MAX), 3);
    CHECK_EQ_INT(tpr_os_spans(spans, 20, iov, 25), 3);
    CHECK(iov[1].iov_len == 10 && iov[2].iov_len == 5);
    CHECK_EQ_INT(tpr_os_spans(spans, 20, iov, 20), 2);
    CHECK_EQ_INT(tpr_os_spans(spans, 20, iov, 1), 1);
    CHECK_EQ_INT(tpr_os_spans(spans, 20, iov, 0), 0);
    CHECK_EQ_INT(tpr_os_spans(spans, 0, iov, 100), 0);
}

static void make_pair(int *fds) {
    REQUIRE_EQ_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
}

TEST(os_send_and_recv) {
    tprpc_span out[20], in[20];
    uint8_t from[2000], to[2000];
    int fds[2];
    size_t none = 0;
    make_pair(fds);
    for (size_t i = 0; i < sizeof from; i++) from[i] = (uint8_t)(i * 7);
    for (size_t i = 0; i < 20; i++) {
        out[i].data = from + i * 100;
        in[i].data = to + i * 100;
        out[i].size = in[i].size = 100;
    }
    CHECK_EQ_INT(tpr_os_recv(fds[1], in, 20, NULL, NULL), -1);
    CHECK_EQ_INT(errno, EAGAIN);
    CHECK_EQ_INT(tpr_os_send(fds[0], out, 20, NULL, 0, false), 1600);
    CHECK_EQ_INT(tpr_os_send(fds[0], out + 16, 4, NULL, 0, true), 400);
    CHECK_EQ_INT(tpr_os_recv(fds[1], in, 1, NULL, NULL), 100);                    /* one span, several, with handles */
    CHECK_EQ_INT(tpr_os_recv(fds[1], in + 1, 9, NULL, NULL), 900);
    CHECK_EQ_INT(tpr_os_recv(fds[1], in + 10, 10, (intptr_t *)(void *)to, &none), 1000);
    CHECK_MEM(from, to, sizeof from);
    hook("send", 1, EPIPE);
    fail_size = 130;                                                              /* a short write, then an error */
    CHECK_EQ_INT(tpr_os_send(fds[0], out, 20, NULL, 0, false), 130);
    CHECK_EQ_INT(tpr_os_send(fds[0], out, 20, NULL, 0, false), -1);
    CHECK_EQ_INT(errno, EPIPE);
    hook("recv", 2, ECONNRESET);
    fail_size = 30;
    CHECK_EQ_INT(tpr_os_recv(fds[1], in, 20, NULL, NULL), 30);
    CHECK_EQ_INT(tpr_os_recv(fds[1], in, 1, NULL, NULL), 30);
    CHECK_EQ_INT(tpr_os_recv(fds[1], in, 20, NULL, NULL), -1);
    CHECK_EQ_INT(errno, ECONNRESET);
    hook("send", 0, EINTR);   /* signals without end: an end all the same */
    CHECK_EQ_INT(tpr_os_send(fds[0], out, 20, NULL, 0, false), -1);
    CHECK_EQ_INT(errno, EAGAIN);
    CHECK_EQ_INT(calls_seen, TPR_OS_RETRIES);
    hook("recv", 0, EINTR);
    CHECK_EQ_INT(tpr_os_recv(fds[1], in, 20, NULL, NULL), -1);
    CHECK_EQ_INT(errno, EAGAIN);
    CHECK_EQ_INT(calls_seen, TPR_OS_RETRIES);
    unhook();
    CHECK_EQ_INT(tpr_os_recv(fds[1], in, 20, NULL, NULL), 70);
    tpr_os_close(fds[0]);
    CHECK_EQ_INT(tpr_os_recv(fds[1], in, 20, NULL, NULL), 0);                     /* the end */
    CHECK_EQ_INT(tpr_os_send(fds[1], out, 20, NULL, 0, false), -1);               /* and no signal */
    CHECK_EQ_INT(errno, EPIPE);
    tpr_os_close(fds[1]);
}

TEST(os_handles) {
    intptr_t give[TPR_OS_HANDLES], got[TPR_OS_HANDLES];
    size_t count;
    int fds[2], before, open_before = test_count_fds();
    char byte = 'x', back = 0;
    tprpc_span out, in;
    make_pair(fds);
    out.data = &byte;
    in.data = &back;
    out.size = in.size = 1;
    for (int i = 0; i < TPR_OS_HANDLES; i++) {
        char text[16];
        give[i] = tpr_os_memfd("test", 4096);
        snprintf(text, sizeof text, "memfd %d", i);
        REQUIRE(give[i] >= 0 && pwrite((int)give[i], text, sizeof text, 0) == (ssize_t)sizeof text);
    }
    before = test_count_fds();
    for (size_t capacity = 0; capacity <= TPR_OS_HANDLES; capacity++) {
        count = capacity;
        REQUIRE_EQ_INT(tpr_os_send(fds[0], &out, 1, give, TPR_OS_HANDLES, false), 1);
        REQUIRE_EQ_INT(tpr_os_recv(fds[1], &in, 1, got, &count), 1);
        CHECK_EQ_INT(count, capacity);                 /* those beyond are closed, not leaked */
        CHECK_EQ_INT(test_count_fds(), before + (int)count);
        for (size_t i = 0; i < count; i++) {
            char text[16], want[16];
            snprintf(want, sizeof want, "memfd %zu", i);
            CHECK(pread((int)got[i], text, sizeof text, 0) == (ssize_t)sizeof text && strcmp(text, want) == 0);
            CHECK(fcntl((int)got[i], F_GETFD) & FD_CLOEXEC);
            tpr_os_close((int)got[i]);
        }
    }
    REQUIRE_EQ_INT(tpr_os_send(fds[0], &out, 1, NULL, 0, false), 1);
    count = TPR_OS_HANDLES;
    REQUIRE_EQ_INT(tpr_os_recv(fds[1], &in, 1, got, &count), 1);
    CHECK_EQ_INT(count, 0);
    REQUIRE_EQ_INT(tpr_os_send(fds[0], &out, 1, give, TPR_OS_HANDLES, false), 1);
    REQUIRE_EQ_INT(tpr_os_recv(fds[1], &in, 1, NULL, NULL), 1);         /* who asks for none gets and keeps none */
    CHECK_EQ_INT(test_count_fds(), before);
    for (int i = 0; i < TPR_OS_HANDLES; i++) tpr_os_close((int)give[i]);
    tpr_os_close(fds[0]);
    tpr_os_close(fds[1]);
    CHECK_EQ_INT(test_count_fds(), open_before);
}

/* ---- os: readiness ----------------------------------------------------------------------------------------------- */

TEST(os_poller) {
    tpr_os_event events[40];
    int poller = tpr_os_poller(), bell = tpr_os_bell(), fds[2], mark;
    int64_t begin;
    char byte = 'x';
    tprpc_span span;
    span.data = &byte;
    span.size = 1;
    make_pair(fds);
    REQUIRE(poller >= 0 && bell >= 0);
    REQUIRE_EQ_INT(tpr_os_poller_set(poller, bell, TPR_OS_READABLE, NULL, false), 0);
    REQUIRE_EQ_INT(tpr_os_poller_set(poller, fds[1], TPR_OS_READABLE, &mark, false), 0);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 0), 0);
    begin = tpr_os_now_us();
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 2500), 0);
    CHECK(tpr_os_now_us() - begin >= 2500);
    tpr_os_bell_ring(bell);
    tpr_os_bell_ring(bell);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, -1), 1);
    CHECK(events[0].user == NULL && events[0].events == TPR_OS_READABLE);
    tpr_os_bell_clear(bell);
    tpr_os_bell_clear(bell);                           /* of one that does not ring: nothing, and no wait */
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 0), 0);
    REQUIRE_EQ_INT(tpr_os_send(fds[0], &span, 1, NULL, 0, false), 1);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 1000000), 1);
    CHECK(events[0].user == &mark && events[0].events == TPR_OS_READABLE);
    REQUIRE_EQ_INT(tpr_os_poller_set(poller, fds[1], TPR_OS_READABLE | TPR_OS_WRITABLE, &mark, true), 0);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 1000000), 1);
    CHECK_EQ_INT(events[0].events, TPR_OS_READABLE | TPR_OS_WRITABLE);
    tpr_os_close(fds[0]);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 1000000), 1);
    CHECK(events[0].events & TPR_OS_HANGUP);
    tpr_os_poller_remove(poller, fds[1]);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 0), 0);
    hook("epoll_wait", 0, EINTR);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 1000000), 0);
    hook("epoll_wait", 0, EBADF);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 40, 1000000), -1);
    unhook();
    tpr_os_close(fds[1]);
    tpr_os_close(bell);
    tpr_os_close(poller);
}

static void sleep_child(void *arg) {
    (void)arg;
    test_sleep_us(60000000);
}

TEST(os_pidfd) {
    tpr_os_event events[4];
    pid_t child = test_fork_run(sleep_child, NULL);
    int poller = tpr_os_poller(), fd = tpr_os_pidfd(child);
    REQUIRE(poller >= 0 && fd >= 0);
    CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    REQUIRE_EQ_INT(tpr_os_poller_set(poller, fd, TPR_OS_READABLE, &events, false), 0);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 4, 5000), 0);
    kill(child, SIGKILL);
    CHECK_EQ_INT(tpr_os_poller_wait(poller, events, 4, 10000000), 1);
    CHECK_EQ_INT(test_wait_child(child, 10), 128 + SIGKILL);
    CHECK_EQ_INT(tpr_os_pidfd(child), -1);
    tpr_os_close(fd);
    tpr_os_close(poller);
}
