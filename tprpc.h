// tprpc - remote procedure calls that carry tensors, between threads, processes and hosts. Version 0.1.0.
//
// Drop this file into your code. In exactly one C or C++ file write
//
//     #define TPRPC_IMPLEMENTATION
//     #include "tprpc.h"
//
// and elsewhere include it plain. It needs Linux (x86-64 or arm64), a compiler for C99 or C++11, and libc with pthreads
// (link with -pthread). It starts no thread that you did not ask for, installs no signal handler, raises no signal. Its
// only global state is the list by which contexts of one process find each other (>>xth). A hello, of a worker that
// calls another:
//
//     tprpc_agent_desc desc = {.name = "client", .init_method = "tcp://127.0.0.1:29500", .rank = 1, .world_size = 2};
//     tprpc_agent *agent;  tprpc_future future;  tprpc_error error;
//     if (tprpc_agent_create(&desc, &agent, &error) || tprpc_agent_wait_ready(agent, 10000, &error)) puts(error.text);
//     tprpc_call(agent, "server", "hello", NULL, NULL, &future);
//     if (tprpc_future_wait(future, TPRPC_FOREVER) == TPRPC_OK) { ... tprpc_future_reply(future) ... }
//
// examples/hello.c is the whole of it, the server included. License: Unlicense or MIT-0, at the end of the file.
//
// CONTENTS, to be searched for. First this manual; then the public part, in which each function's contract stands once,
// above its declaration: outcomes, context, messages, pipes, stores, agents, reports, backends, DLPack. Then, under
// TPRPC_IMPLEMENTATION, the sections; each uses only what stands above it:
//
//   >>atomic      atomic operations that C99, C11 and C++11 all compile
//   >>os          system calls, each through one function
//   >>base        memory, log, errors, lists, maps, buffers
//   >>wire        every byte that a peer can send: formats, bounded readers and writers
//   >>timer       the timing wheel: every timeout
//   >>process     other processes, watched for their end
//   >>loop        who drives, spins, sleeps and is woken; deferred work and callbacks
//   >>context     hooks, limits, threads, the list of backends
//   >>transport   what transports have in common
//   >>tcp         connections over IPv4 and IPv6
//   >>shm         connections through memory that two processes share
//   >>channel     what channels have in common
//   >>batch       what the channels for host memory have in common: fetched by the receiver, or sent through the pipe
//   >>basic       host memory through the pipe's own connection
//   >>xth         host memory between threads of one process
//   >>cma         host memory of another process of this host, read from there
//   >>bulk        host memory of another process of this host, through memory that both share
//   >>mpt         host memory over several connections of a network
//   >>backends    the registry; contexts are created here
//   >>pipe        agreement with the other end, and the messages
//   >>store       where workers find each other
//   >>agent       calls and requests
//   >>group       who is in the group: joining and leaving it
//   >>report      what a person reads
//   >>dlpack      DLPack tensors, when dlpack.h was included before
//
// THE PARTS. A context is a loop with its hooks. An agent is a worker of a group: it calls methods of other workers by
// name and serves its own. A store is where the group meets. Below agents, and usable without them, are pipes: ordered
// messages between two ends. A transport is how a pipe's bytes travel (shm, tcp), a channel how tensors do (xth,
// bulk, cma, mpt, basic).
//
// Structs that end in _desc describe what is to be created. A field that is zero has its default, which its comment
// names; so in C write {.name = ...}, in C++ `tprpc_agent_desc d = {}; d.name = ...`. Every duration has its unit in
// its name; 0 means the default, TPRPC_NOW no time at all, TPRPC_FOREVER no limit.
//
//
// THE LOOP, AND WHO DRIVES IT
//
// There are two progress modes, chosen by tprpc_context_desc.threads:
//
//   0, polled       The library runs when you call it: in tprpc_poll, or in a function that waits. This is for programs
//                   that have a main loop, and it is the fastest for those that just wait: no thread stands between.
//   1 and more      That many loops, each with a thread of its own. A connection belongs to one of them.
//
// Callbacks (handlers, on_done, on_ready, done, release, ...) follow one rule. In a polled context they run on the
// callback thread alone: the one that created the context, or the last that called tprpc_context_bind_thread; and
// there only inside tprpc_poll or a wait. In a threaded context they run on the loop's thread. So callbacks of a
// polled context need no locks against the code that polls. There are two exceptions. `place` runs on whichever thread
// moves the bytes, and calls nothing of tprpc. A method registered with TPRPC_METHOD_BLOCKING runs as a job of
// `submit`, or on the agent's worker_threads, so that its work holds up nobody. (Log and thread hooks and the
// allocator: any thread.)
//
// All public functions may be called from any thread, unless their contract says otherwise, and from within callbacks,
// but for the destroy functions. No lock of ours is held while your callbacks run. Callbacks of one pipe never run
// at the same time; nor do handlers of calls that came over one pipe, but for blocking ones.
//
// tprpc_poll has a budget: it starts nothing new after that time, and overshoots by at most one chunk and one callback.
// A game calls tprpc_poll(ctx, TPRPC_NOW, 1500) once in a frame; examples/engine_loop.cpp does.
//
// Waits: tprpc_future_wait and its like drive the loop when nobody else does, and hand it on before they return. So
// any thread may wait for its own future, also on a polled context, and gets it even when the callback thread is busy;
// such a wait moves bytes and ends the future, but its on_done follows on the callback thread. A wait within a
// callback runs other callbacks meanwhile, nested at most limits.nesting deep.
//
// A waiting thread first spins for spin_us, then sleeps until something comes. Spinning makes a call several times
// faster where both ends have a processor to themselves, and slower where they share one: there set spin_us to
// TPRPC_NOW.
//
// To others a context is in one of three states. Polling or waiting: peers just write. Asleep or armed: peers wake it.
// Away, which is an engine between two frames: nobody wakes it, and nothing is lost; the bytes wait. Idle costs no CPU.
//
// Foreign loops (epoll, libuv, an engine's): watch tprpc_context_handle for reading. Before you sleep call
// tprpc_context_arm; when it returns false, poll first. When the handle turns readable, or at the deadline that arm
// gave, call tprpc_poll.
//
//     for (;;) {
//         int64_t deadline_us;
//         if (!tprpc_context_arm(ctx, &deadline_us)) { tprpc_poll(ctx, TPRPC_NOW, 0); continue; }
//         sleep_in_poll_or_epoll(tprpc_context_handle(ctx), deadline_us);
//         tprpc_poll(ctx, TPRPC_NOW, 0);
//     }
//
//
// BYTES, AND WHOSE THEY ARE
//
// A message has metadata (a call's body: small, always there when the handler runs), tensors (bulk, on any device),
// and on pipes also payloads. It goes out in one of three ways:
//
//   copied      `release` is NULL. All is copied before the function returns: the array may be on the stack.
//   borrowed    `release` is set. Structs, arrays and strings are copied, the bytes are not; they must stay as they are
//               until release(release_user) runs, exactly once, whatever becomes of the message. If the function
//               returns an error, release has run already. What happens where they are freed sooner is undefined.
//   given       `release` is set, and TPRPC_MESSAGE_GIVE in `flags`. As borrowed; and where the receiver is in this
//               process and has no memory of his own for it, he may get this memory itself instead of a copy (channel
//               xth), and write to it, until he is done with the message: only then release runs. A request that he
//               keeps, keeps the memory; while he does, the sender's agent and context cannot be destroyed (TIMEOUT).
//               tensor_bytes_adopted, of a pipe's info and of an agent's stats, counts what came so.
//
// The outcome of a call and its release are two events, in any order: after a timeout a peer may still be reading.
//
// What comes in belongs to the library. It is valid until the request is answered, the future released, or the
// callback that showed it returns; it is 64-byte aligned and may be written to, so a handler may change a tensor in
// place and reply with it. To receive into memory of your own set `place`, of a method or of a call: it sees the
// descriptor (sizes, shapes, metadata) before the bytes come, and says where each tensor goes. If the message then
// fails, on_unplaced says that the memory is yours again.
//
// After a warm-up the library allocates nothing for calls: blocks are kept and used again.
//
//
// PIPES
//
// tprpc_listen and tprpc_accept on one side, tprpc_connect on the other. A pipe may be used at once; operations wait
// until it is connected and agreed. A message is read in two steps: read_descriptor shows what comes, read says where
// it goes; or in one, with memory of the library's. Descriptors come in the order written. Completions of writes and
// of reads are independent of each other, unless the pipe was created `ordered`. Every operation that was accepted
// ends in exactly one callback, also when the pipe or the context is closed under it.
//
// A reader that does not read stalls its writer, whose messages queue up to limits.inflight_bytes; beyond it a write is
// refused with LIMIT. Large buffers are sent when the reader has said where they go, so they take no memory meanwhile.
//
//
// HOW BYTES TRAVEL, AND HOW THAT IS CHOSEN
//
// A pipe begins on the address it was given. The two ends then tell each other what they have, and move the pipe to
// the best transport that both have and that reaches the other: shm (200) on one host, tcp (0) else. Channels are
// chosen likewise, by priority: xth (1300) within one process, bulk (1200) and cma (1190) between processes of one
// host, mpt (1100) over a network, basic (1000) everywhere; one that needs it is proven by moving a nonce before it
// carries anything of yours. What fails is passed over, the next is tried, and the reason is kept: tprpc_pipe_get_info,
// tprpc_agent_get_peer_info and tprpc_agent_report show it. Nothing that a machine lacks is fatal.
//
// bulk moves tensors through memory that both ends share: the sender copies in while the receiver copies out, which is
// the fastest where each has a processor to itself. cma reads the sender's memory from where it is (process_vm_readv):
// one copy, by the receiver, on up to four of its threads, and none of the sender's time. Which is faster depends on
// the processors that are free, so a pipe tries both with its first large tensors (1 MiB and more), three times each,
// stays with the faster, and looks at the other one in 64 times again. Name them in .channels ("xth,cma,bulk,basic"),
// and that is the order. cma needs a right in each direction: where the system's ptrace_scope is 1 the sender grants it
// by .let_read, at 2 only root has it, at 3 nobody. A buffer that turns out to be unreadable is sent through the pipe
// after all.
//
// Tensors of 256 KiB and more travel over a connection of their own beside the pipe's, a lane, which is made when the
// first of them is sent: so a call does not wait behind megabytes in one socket. Where it cannot be made they travel
// with the rest, and tprpc_path.why says why it is missing. A lane that is lost fails the tensors that it carried, with
// PEER, not the pipe. While small messages are about, bulk moves 16 KiB at a time through memory, 32 KiB through
// sockets, else 256 KiB. On a network where one connection does not get all there is (a limit per flow, several links
// bonded) set .lanes at both ends: mpt then spreads a tensor over that many. On one path that is no faster, and it is
// not used unless asked for.
//
// tprpc_context_desc.transports and .channels say which pipes may use, in order of preference ("shm,tcp"); a store on
// tcp:// works all the same. Backends of your own are tables of functions, given in .backends: see the public part.
//
// Small messages travel inline, in frames; one of up to 256 bytes of metadata, without tensors and payloads, takes a
// shorter path yet, as calls and replies do. Bulk moves in chunks between which small messages pass.
//
//
// STORES
//
//   tcp://host:port    rank 0 (or who sets serve) serves it, the others are its clients
//   file://path        a file that all can write; changes are made under a file lock
//   env://             tcp:// of MASTER_ADDR and MASTER_PORT, with RANK and WORLD_SIZE, as torchrun and others set
//                      them. Where torchrun's own store is at MASTER_PORT (TORCHELASTIC_USE_AGENT_STORE is True), rank
//                      0 cannot serve there: give all workers another MASTER_PORT
//   local://           in the memory of this process; hand its pointer to other contexts
//
// A store of your own is a table of three functions. Operations are asynchronous, with a done callback;
// tprpc_store_wait is for threads that may wait. An agent opens its store by itself, from init_method, unless it is
// given one.
//
//
// AGENTS
//
// create is local. Register methods, also later; then start or wait_ready joins the group. A static group has
// world_size workers, each with a rank, and is ready when all are there; a worker that never comes is named after
// start_timeout_ms. In a dynamic group (world_size 0) a worker is ready when it is known to the store, and others are
// looked up by name.
//
// A call goes to a worker and a method by name; tprpc_resolve looks both up once for tprpc_call_id, which is for the
// hot path. Synchronous: wait for its future. Asynchronous: on_done, which needs no future. One-way:
// TPRPC_CALL_ONE_WAY, whose outcome is that the message left. If a call is refused at once, its status says why, and
// options.error gets the sentence. A call runs at most once; TPRPC_CALL_IDEMPOTENT permits a retry, and none is made in
// this version. Calls have no order among each other, except those with the same lane (not 0) to one worker: their
// handlers start in order.
//
// A handler answers with tprpc_reply or tprpc_fail, or keeps the request (tprpc_request_keep) and answers later, from
// any thread, as examples/late_reply.c does. One that does neither fails the call with a sentence that says so. An
// answer that comes twice, or after the caller has given up, is INVALID and does no harm; tprpc_request_cancelled
// tells a long job that nobody waits any more.
//
// leave is graceful: in a static group it waits until all leave and serves them meanwhile. destroy is not: it ends
// what is open with CLOSED, runs the last callbacks on the calling thread, and nothing runs after it. Join your own
// jobs that hold requests before you destroy the agent, and destroy agents before their context. unregister is for hot
// reload: after it returned no code of that method runs.
//
//
// ERRORS AND DEATHS
//
// Functions return a status; TPRPC_OK is 0. tprpc_error adds the system's code and a sentence that names the peer, the
// backend and what was tried; a handler's failure arrives as REMOTE with its own code and text. A function that
// returns an error is followed by no callback. What is wrong in itself (NULL, out of range) asserts, and is INVALID
// where assertions are off; what depends on time or on the other end (a stale future, a late answer) is INVALID
// always.
//
// A peer's death on this host is seen at once: its socket closes, and its process is watched beside, for a forked child
// can keep a socket open (over tcp the pipe then ends 100 ms after the last byte that came). On other hosts TCP
// keep-alive, and a look at unacknowledged data, take 30 s; a peer that stands in a debugger is not dead. Everything in
// flight to it then fails once, with PEER or UNREACHABLE, and the next call connects anew. (A tcp:// store does not
// watch processes: a connection that a dead client's child holds stays until the child ends; nothing waits for it.)
//
// Nothing that a peer, the network or the system does aborts the process.
//
//
// TRUST
//
// A peer must be of this user, where it is on this host: shm asks the kernel, on a loopback TCP connection the owner
// of the other socket is looked up. Another user is DENIED. Memory is shared as sealed memfds, so no peer can shrink
// it under us; whatever a peer writes, on a socket or in shared memory, is checked before it is used.
//
// Addresses other than loopback are refused unless `insecure` is set, which means what it says: no encryption, and who
// reaches the port may call. A `secret` is UNSUPPORTED until TLS is built in; it is never ignored. An agent publishes
// `address`, or else the interface that routes to its store. A store that has no host (file://, local://, a user's)
// says nothing of that: then it is loopback, and the group is on one host. With `insecure` on file:// or a user's
// store, start demands `address`.
//
//
// FORK
//
// A forked child must not use a context of its parent, nor what belongs to it: functions return INVALID, and
// descriptors close on exec. Create contexts after the fork, as examples/wave.c does.
//
//
// HOOKS
//
// In tprpc_context_desc: allocator (tag: which section asks), log (silent without), submit (the engine's jobs),
// thread_begin and thread_end, clock_us. They must not call tprpc, but for what submit runs. Log lines are kept until
// no lock is held: of a burst the first 64 come, then one that tells how many were dropped. Macros are compiled in:
//
//   TPRPC_ASSERT(condition)               misuse (default: assert, nothing with NDEBUG)
//   TPRPC_LOG_LEVEL                       levels above it are compiled out: 0 panic, 1 error, 2 warning, 3 info,
//                                         4 debug (default: 3)
//   TPRPC_ZONE_BEGIN(name), _END(name)    profiler zones: on one thread, nested, name a literal (default: nothing)
//   TPRPC_SPAN_BEGIN(name, id), _END      asynchronous spans, a call from its start to its outcome (default: nothing)
//   TPRPC_PLOT(name, value)               a number over time (default: nothing): "tprpc active calls" of each loop
//
// Define them in the file that has TPRPC_IMPLEMENTATION, above the include. So with all that follow:
//
//
// CONFIGURATION
//
//   TPRPC_IMPLEMENTATION    the implementation, in one file of the program
//   TPRPC_STATIC            all functions are static: where the implementation is, is where it is used. In all files
//   TPRPC_DLL               functions are exported from a shared library. In all files
//   TPRPC_API               what stands before each public function, instead of what these two choose. In all files
//   TPRPC_NO_TCP            without tcp, and without tcp:// and env:// stores
//   TPRPC_NO_SHM            without shm
//   TPRPC_NO_XTH            without xth
//   TPRPC_NO_CMA            without cma
//   TPRPC_NO_BULK           without bulk
//   TPRPC_NO_MPT            without mpt
//   TPRPC_NO_THREADS        no threads: contexts are polled; `threads` and worker_threads are UNSUPPORTED
//   TPRPC_NO_DLOPEN         no dlopen: what is loaded at run time is missing (nothing is, in this version)
//   TPRPC_NO_FILES          no files: no file:// stores; a socket's owner is asked of sock_diag alone
//   TPRPC_NO_GETENV         no environment: no env:// stores
//   _GNU_SOURCE             the implementation defines it; if a system header comes before, do it yourself
//
//
// LIMITS AND DEFAULTS. Those with a name in the middle are settable, 0 being the default.
//
//   what                                              where                                 value
//   tensors and payloads of a message, in bytes       limits.message_bytes                  16 GiB
//   metadata of a message, in bytes                   limits.metadata_bytes                 1 MiB
//   tensors and payloads of a message, their number   limits.tensors                        4,096 (at most 65,535)
//   dimensions of a tensor                            TPRPC_MAX_DIMS                        8
//   the library's own memory                          limits.memory_bytes                   4 GiB
//   copied bytes that wait to leave, of a pipe        limits.inflight_bytes                 256 MiB
//   pipes of a context                                limits.pipes                          16,384
//   incoming connections that are no pipes yet        limits.handshakes                     1,024
//   calls of an agent that are pending, either way,   limits.pending_calls                  4,194,304
//   on each loop
//   waits within callbacks                            limits.nesting                        16
//   a wait spins before it sleeps                     tprpc_context_desc.spin_us            50 us
//   a pipe is connected and agreed                    tprpc_pipe_desc.timeout_ms            10 s
//   a peer that connects has said who it is           -                                     10 s
//   a better transport is tried                       -                                     2 s
//   a call                                            timeout_ms of agent and call          60 s
//   start and leave                                   tprpc_agent_desc.start_timeout_ms     60 s
//   a store's operation, and to reach its server      tprpc_store_desc.timeout_ms           60 s
//   a silent TCP peer is dead after                   -                                     30 s
//   names of workers and methods, in bytes            -                                     1 to 128
//   where an agent finds its group, in bytes          init_method, address                  255 each
//   threads of an agent for blocking handlers         tprpc_agent_desc.worker_threads       1,024
//   what tprpc_fail says, in bytes                    -                                     199
//   keys of a store, in bytes                         -                                     1 to 255
//   values of a store, in bytes                       -                                     65,536
//   gets of one store client that wait                -                                     4,096
//   workers of a static group                         tprpc_agent_desc.world_size           1,048,576
//   addresses of a listener                           tprpc_listener_desc.addresses         16
//   a name after shm://, in bytes                     -                                     100
//   loops of a context                                tprpc_context_desc.threads            64
//   backends of a context, ours included              tprpc_context_desc.backends           31
//   channels among them, ours included                -                                     16
//   name of a backend, in bytes                       -                                     1 to 15
//   read of a peer before it is known                 -                                     4 KiB
//   host buffers that travel within the message       a channel's inline_bytes              8 KiB each, 32 KiB in all
//   metadata of a message on the short path           -                                     256
//   a channel's own bytes within a message            max_descriptor                        4 KiB
//   a channel's control message, and its handles      tprpc_link_control                    4 KiB, 8
//   handles of an shm connection that are under way   -                                     32
//   frames sent and not consumed by the peer          -                                     1 MiB
//   a chunk of bulk                                   -                                     256 KiB, at most 1 MiB
//   bulk that goes over a lane                        -                                     from 256 KiB on
//   lanes of a pipe                                   tprpc_context_desc.lanes              1 (at most 8)
//   a lane is made, and tried again after             -                                     2 s; 1 s, later up to 64 s
//   a ring of shm, each way                           -                                     256 KiB
//   an error's sentence, in bytes                     tprpc_error.text                      243
//   backends that a pipe's info shows                 tprpc_pipe_info.paths                 16
//   lines of the log until they are written           tprpc_context_desc.log                64, of 199 bytes each

#ifndef TPRPC_H
#define TPRPC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TPRPC_VERSION  100    // major * 10000 + minor * 100 + patch
#define TPRPC_MAX_DIMS 8      // fixed: no macro of a user's changes a public struct
#define TPRPC_FOREVER  (-1)   // for every *_ms and *_us: no limit. 0 means the default,
#define TPRPC_NOW      (-2)   // which for tprpc_poll and tprpc_future_wait is NOW: do not wait

#ifndef TPRPC_API
#if defined(TPRPC_STATIC)
#define TPRPC_API static __attribute__((unused))
#elif defined(TPRPC_DLL)
#define TPRPC_API extern __attribute__((visibility("default")))
#else
#define TPRPC_API extern
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ---- outcomes -----------------------------------------------------------------------------------------------------

typedef enum tprpc_status {
    TPRPC_OK = 0,
    TPRPC_PENDING,             // a wait ended before what it waited for
    TPRPC_ERROR_INVALID,       // misuse: assert in debug builds, this in release builds
    TPRPC_ERROR_MEMORY,
    TPRPC_ERROR_LIMIT,         // a configured or system limit
    TPRPC_ERROR_TIMEOUT,
    TPRPC_ERROR_CANCELLED,
    TPRPC_ERROR_CLOSED,        // this end was closed
    TPRPC_ERROR_PEER,          // the other end died, left or closed
    TPRPC_ERROR_UNREACHABLE,
    TPRPC_ERROR_PROTOCOL,      // the peer sent what the protocol forbids
    TPRPC_ERROR_DENIED,        // not authenticated, or refused
    TPRPC_ERROR_UNSUPPORTED,   // no backend can do this here
    TPRPC_ERROR_NO_WORKER,
    TPRPC_ERROR_NO_METHOD,
    TPRPC_ERROR_REMOTE,        // the handler failed: user_code and text are its own
    TPRPC_ERROR_DEVICE,        // a device was lost or its driver failed
    TPRPC_ERROR_SYSTEM         // anything else from the operating system
} tprpc_status;

typedef struct tprpc_error {   // plain data; text names the peer, the backend and what was tried
    tprpc_status status;
    int32_t      os_code;      // errno, or the driver's code
    int32_t      user_code;    // what the handler gave to tprpc_fail
    char         text[244];
} tprpc_error;

// The status's name without its prefix: "ok", "peer", "no_worker". A literal; any thread; never NULL.
TPRPC_API const char *tprpc_status_name(tprpc_status status);

// Set-up functions, register, unregister and start included, take `tprpc_error *error` last (NULL allowed; written
// only on failure). Callbacks get a `const tprpc_error *`, valid during the call, NULL when the status is TPRPC_OK. A
// function that returns an error is followed by no callback; a `release` has run by then.
//
// Versions: creating functions pass TPRPC_VERSION and the size of their descriptor, so a header and a library that
// differ fail with a sentence. A struct that the library fills takes its size as an argument; a table or struct
// handed to user code starts with `uint32_t size`. Fields are only ever appended.

// ---- the context: loop, backends, hooks ---------------------------------------------------------------------------

typedef struct tprpc_context tprpc_context;

typedef struct tprpc_allocator {
    // NULL: no memory. tag: four letters of the section that asks (default: malloc)
    void *(*alloc)(size_t size, size_t align, uint32_t tag, void *user);
    // size and tag as given to alloc (default: free)
    void  (*free)(void *ptr, size_t size, uint32_t tag, void *user);
    void  *user;                     // (default: NULL)
} tprpc_allocator;

enum { TPRPC_LOG_PANIC = 0, TPRPC_LOG_ERROR = 1, TPRPC_LOG_WARNING = 2, TPRPC_LOG_INFO = 3, TPRPC_LOG_DEBUG = 4 };
typedef struct tprpc_log {
    int32_t level; uint32_t id;      // TPRPC_LOG_*; id: stable per message, the hash of its format
    const char *section, *peer, *text, *file; int32_t line;   // valid during the call; peer "" when none is meant
} tprpc_log;

typedef struct tprpc_limits {        // 0: the default, which the manual's table gives
    uint64_t message_bytes;          // payloads and tensors of one message, in all (default: 16 GiB)
    uint64_t metadata_bytes;         // metadata of one message, in all (default: 1 MiB)
    uint64_t memory_bytes;           // the library's own allocations, in all, and the memory of each shm connection
                                     // that it began, 516 KiB (default: 4 GiB)
    uint64_t inflight_bytes;         // copied outgoing bytes of one pipe, queued (default: 256 MiB)
    uint32_t tensors;                // tensors and payloads of one message (default: 4,096)
    uint32_t pipes;                  // pipes of a context (default: 16,384)
    uint32_t pending_calls;          // of an agent, either side, on each loop; as many may wait for a release beside
                                     // (default: 4,194,304)
    uint32_t handshakes;             // incoming connections not yet pipes (default: 1,024)
    uint32_t nesting;                // waits inside callbacks, one in the other (default: 16)
} tprpc_limits;

typedef struct tprpc_context_desc {
    // The user's own and tprpc_cuda_backends(): outlive the context (default: NULL)
    const struct tprpc_backend *const *backends;
    size_t          backend_count;   // (default: 0)
    int32_t         threads;         // I/O threads the library starts (default: 0, polled)
    int64_t         spin_us;         // how long a wait spins before it sleeps; TPRPC_NOW: not at all (default: 50)
    const char     *transports;      // "shm,tcp": allowed, in order of preference (default: NULL, all that are viable)
    const char     *channels;        // likewise (default: NULL, all that are viable)
    int32_t         lanes;           // connections over which mpt spreads a large tensor, at most 8; 1: it is not used
                                     // (default: 1)
    bool            let_read;        // processes of this user may read this one's memory, for the channel cma, also
                                     // where ptrace_scope is 1: PR_SET_PTRACER, until it exits (default: false)
    tprpc_allocator allocator;       // any thread, may be called under a lock (default: malloc and free)
    void          (*log)(const tprpc_log *entry, void *user);               // any thread, no lock held (default: none)
    bool          (*submit)(void (*run)(void *), void *arg, void *user);    // the engine's jobs, for blocking handlers;
                                     // false: full; an accepted job must be run (default: none)
    void          (*thread_begin)(const char *name, void *user);            // on each thread of ours (default: none)
    void          (*thread_end)(const char *name, void *user);              // on each thread of ours (default: none)
    int64_t       (*clock_us)(void *user);                                  // (default: the monotonic clock)
    void           *user;            // for the hooks above but allocator's (default: NULL)
    tprpc_limits    limits;          // (default: as each field says)
} tprpc_context_desc;

// TPRPC_VERSION of the implementation that was linked. Any thread.
TPRPC_API int32_t tprpc_version(void);

// Creates a context: its loops, its threads when asked for, and an instance of every backend that is viable here.
//   desc        copied, but for the backends. NULL: all defaults.
//   desc_size   sizeof(tprpc_context_desc) of the caller; version: TPRPC_VERSION of the caller.
//   out         the context; the caller destroys it.
// The calling thread becomes the callback thread of a polled context. Errors: INVALID (sizes, versions, unknown backend
// names, listing the known ones), MEMORY, LIMIT (no descriptors, too many backends), SYSTEM, UNSUPPORTED (no transport
// is viable).
TPRPC_API tprpc_status tprpc_context_create_for(const tprpc_context_desc *desc, size_t desc_size, int32_t version,
                                                tprpc_context **out, tprpc_error *error);
static inline tprpc_status tprpc_context_create(const tprpc_context_desc *desc, tprpc_context **out,
                                                tprpc_error *error) {
    return tprpc_context_create_for(desc, sizeof *desc, TPRPC_VERSION, out, error);
}

// Destroys the context and all it owns: pipes, listeners and stores are closed, what was pending ends with CLOSED,
// its callbacks run on this thread before this returns, and none runs after. Agents must have been destroyed before.
// NULL is fine. No other thread may be using the context. INVALID, and nothing done, inside a callback, while an
// agent of it lives, and in a forked child. TIMEOUT when a user's store or backend has not ended what it was given 30 s
// after it was asked to, or a receiver of this process still has a message that was given to it (TPRPC_MESSAGE_GIVE):
// the threads have stopped and nothing is freed, for the late end would come to freed memory. Then let it end, and
// destroy again; nothing else may be done with the context.
TPRPC_API tprpc_status tprpc_context_destroy(tprpc_context *ctx);

// Moves bytes and runs callbacks.
//   wait_us     how long to wait for work, in microseconds (0 and TPRPC_NOW: do not wait; TPRPC_FOREVER). A context of
//               several loops does not wait here: their threads do.
//   budget_us   stop starting work after that many microseconds (0 and TPRPC_FOREVER: no limit); it overshoots by at
//               most one chunk and one callback.
// Returns true when work was left because the budget ran out. On the callback thread of a polled context callbacks
// run; on another thread, and in a threaded context, it only moves bytes. Returns once anything was done, else after
// wait_us.
TPRPC_API bool tprpc_poll(tprpc_context *ctx, int64_t wait_us, int64_t budget_us);

// Ends a tprpc_poll that sleeps, or the next one, at once. Any thread, a signal handler included.
TPRPC_API void tprpc_wake(tprpc_context *ctx);

// From here on the callbacks of a polled context run on the calling thread. Not while another thread is polling it.
TPRPC_API void tprpc_context_bind_thread(tprpc_context *ctx);

// For foreign loops (epoll, libuv, an engine's own) on a polled context: a descriptor that turns readable when an armed
// context has work. It belongs to the context: wait on it, never read or close it.
TPRPC_API intptr_t tprpc_context_handle(tprpc_context *ctx);

// false: work is left, poll again. true: until the next poll the handle turns readable when there is work; poll by
// the deadline at the latest (in microseconds from now; TPRPC_FOREVER: none). A context that is neither polling nor
// armed is away: no peer wakes it. Callback thread only.
TPRPC_API bool tprpc_context_arm(tprpc_context *ctx, int64_t *deadline_us);

enum { TPRPC_BACKEND_TRANSPORT = 1, TPRPC_BACKEND_CHANNEL = 2, TPRPC_BACKEND_CONVERTER = 3 };
typedef struct tprpc_backend_info {  // a backend as a context has it
    char        name[16];
    const char *summary;             // one sentence, the backend's own: valid while the backend is
    int32_t     kind;                // TPRPC_BACKEND_*
    int32_t     priority;            // as the context orders it: the larger comes first among those of its kind
    bool        viable;              // this context uses it
    char        why[160];            // where it does not: why
    uint32_t    domain_size;         // bytes of domain; 0: it reaches everything, or is not viable
    uint8_t     domain[64];          // what it can reach, as the two ends of a pipe compare it; of the first loop
} tprpc_backend_info;
// Tells which backends the context knows, viable or not, the user's own first: fills the first `capacity` of `out`
// (`size`: sizeof *out of the caller). Returns how many there are; 0 for a size that is none. Any thread.
TPRPC_API size_t tprpc_context_get_backends(tprpc_context *ctx, tprpc_backend_info *out, size_t capacity, size_t size);

// ---- messages -----------------------------------------------------------------------------------------------------

enum { TPRPC_DEVICE_DEFAULT = 0, TPRPC_CPU = 1, TPRPC_CUDA = 2, TPRPC_DEVICE_USER = 64 };
typedef struct tprpc_device { int32_t kind, index; } tprpc_device;   // as a source, DEFAULT is CPU; as a target, the
                                                                     // device map's choice, else the source's kind
typedef enum tprpc_dtype {           // TPRPC_BYTES with ndim 0: raw. Otherwise shape x dtype equals size, checked
    TPRPC_BYTES = 0, TPRPC_BOOL, TPRPC_I8, TPRPC_I16, TPRPC_I32, TPRPC_I64, TPRPC_U8, TPRPC_U16, TPRPC_U32, TPRPC_U64,
    TPRPC_F16, TPRPC_BF16, TPRPC_F32, TPRPC_F64, TPRPC_C64, TPRPC_C128
} tprpc_dtype;

typedef struct tprpc_tensor {        // memory on one device
    void        *data;               // NULL is fine when size is 0
    size_t       size;               // bytes
    tprpc_device device;
    void        *stream;             // TPRPC_CUDA: a CUstream; data is ready in its order
    tprpc_device target;             // where the receiver is asked to place it
    int32_t      dtype, ndim;
    int64_t      shape[TPRPC_MAX_DIMS];
    int64_t      strides[TPRPC_MAX_DIMS];   // in elements; all 0: contiguous. Transfers refuse others by name
    const void  *metadata;
    size_t       metadata_size;
} tprpc_tensor;

typedef struct tprpc_payload { void *data; size_t size; const void *metadata; size_t metadata_size; } tprpc_payload;

typedef struct tprpc_message {
    const void         *metadata;    // a call's body
    size_t              metadata_size;
    const tprpc_tensor *tensors;     // bulk, any device
    size_t              tensor_count;
    const tprpc_payload *payloads;   // pipes only, as in TensorPipe
    size_t              payload_count;
    void              (*release)(void *user);   // see below
    void               *release_user;
    uint32_t            flags;       // TPRPC_MESSAGE_*; of an incoming one 0
} tprpc_message;
enum { TPRPC_MESSAGE_GIVE = 1 };     // with `release`: a receiver of this process may have the memory itself
// Outgoing: structs, arrays and strings are copied before the function returns. Bytes too (device memory by a copy in
// stream order), unless `release` is set: then they are borrowed until it runs, exactly once. When the function
// returns an error it runs before that, on the calling thread; otherwise on the callback thread (polled) or a loop's
// (threaded), whatever the outcome. A call's outcome and its release are two events: after a time-out a peer may
// still be reading. A pipe read's `allocation`: its arrays are copied, its memory is borrowed until `done` runs.
// TPRPC_MESSAGE_GIVE allows more: host tensors and payloads that are 64-byte aligned may be shown in place to a
// receiver of this process, who reads and writes them as his own; `release` runs when he is done with the message,
// however long that takes, also where this end's pipe is closed before. Nobody else may look at them until then; what
// they hold after it is open. It is no promise: what is not aligned, goes to another process or is placed by the
// receiver is copied. Without `release` there is nothing to give, and it is ignored. Unknown flags are INVALID.
// Incoming: bytes the library allocated, or was given, are 64-byte aligned and writable; they live until the request
// is answered, the future released, or the callback that showed them returns.

// Bytes of one element, 0 for an unknown dtype. Any thread.
TPRPC_API size_t tprpc_dtype_size(int32_t dtype);

// ---- pipes: ordered messages between two ends -----------------------------------------------------------------------

typedef struct tprpc_listener tprpc_listener;
typedef struct tprpc_pipe tprpc_pipe;

typedef void (*tprpc_accepted)(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user);
typedef void (*tprpc_written)(tprpc_status status, const tprpc_error *error, void *user);
typedef void (*tprpc_described)(tprpc_status status, const tprpc_message *descriptor, const tprpc_error *error,
                                void *user);
typedef void (*tprpc_read)(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user);

typedef struct tprpc_listener_desc {
    const char *const *addresses;    // "tcp://127.0.0.1:0", "tcp://[::1]:7000", "shm://", "shm://name"; with port 0 or
                                     // no name one is chosen (default: none, which is INVALID)
    size_t address_count;            // (default: none, which is INVALID)
    bool ordered;                    // for accepted pipes: callbacks in order of issue (default: false)
    bool insecure;                   // allow an address other than loopback (default: false)
} tprpc_listener_desc;

typedef struct tprpc_pipe_desc {
    const char *address;             // as a listener gave it (default: none, which is INVALID)
    bool ordered;                    // callbacks in order of issue (default: false)
    bool insecure;                   // allow an address other than loopback (default: false)
    int64_t timeout_ms;              // to be connected and agreed (default: 10,000)
} tprpc_pipe_desc;

// Listens on every address given. A connection that comes in is moved to the best transport that both ends have.
//   desc   copied. out: closed by the caller, or with the context.
// Names are looked up here, which may block. Errors: INVALID (an address that is not one), UNREACHABLE (in use, no such
// interface), UNSUPPORTED (transport unknown or not viable; not loopback and not `insecure`), LIMIT, MEMORY.
TPRPC_API tprpc_status tprpc_listen(tprpc_context *ctx, const tprpc_listener_desc *desc, tprpc_listener **out,
                                    tprpc_error *error);

// Asks for one incoming pipe; `done` runs once with it, or with an error (CLOSED when the listener is closed first).
// The pipe belongs to the callee, who closes it. Connections wait, within limits.handshakes, until asked for; beyond
// it, one that comes takes the place of the one that has been silent for longest, and where none is silent is dropped.
// Any thread.
TPRPC_API tprpc_status tprpc_accept(tprpc_listener *listener, tprpc_accepted done, void *user);

// The address a peer connects to, with the port or name that was chosen. transport: "tcp", "shm", or NULL for the
// first. NULL when it does not listen there. Valid until the listener is closed. Any thread.
TPRPC_API const char *tprpc_listener_address(tprpc_listener *listener, const char *transport);

// Stops listening; pending accepts end with CLOSED; pipes accepted before live on. The pointer is no longer valid.
TPRPC_API void tprpc_listener_close(tprpc_listener *listener);

// Connects. The pipe is usable at once: operations wait until it is connected and agreed, or fail with the reason.
// Names are looked up here, which may block. Errors: INVALID, UNREACHABLE (an address that cannot be), UNSUPPORTED,
// LIMIT, MEMORY; whatever the network says comes to the operations.
TPRPC_API tprpc_status tprpc_connect(tprpc_context *ctx, const tprpc_pipe_desc *desc, tprpc_pipe **out,
                                     tprpc_error *error);

// Sends a message. `done` (NULL allowed) runs when the library needs the memory no longer: all bytes have left or
// been copied; it says nothing about the peer having read. Errors (no callback follows): INVALID (a message that
// cannot be: the pipe is as before), LIMIT (over limits.message_bytes, .metadata_bytes, .tensors or .inflight_bytes:
// likewise), MEMORY, UNSUPPORTED (strides), and after the pipe failed what it failed with, whose sentence
// tprpc_pipe_get_info has. Any thread.
TPRPC_API tprpc_status tprpc_pipe_write(tprpc_pipe *pipe, const tprpc_message *message, tprpc_written done, void *user);

// Asks for the next message's descriptor: sizes, shapes, targets and all metadata; `data` pointers are NULL.
// Descriptors come in the order written. It stays valid until the message's read has ended. Errors: MEMORY, and as of a
// write, what the pipe failed with. Any thread.
TPRPC_API tprpc_status tprpc_pipe_read_descriptor(tprpc_pipe *pipe, tprpc_described done, void *user);

// Reads the oldest message that was described and not read yet.
//   allocation   `tensors` and `payloads` of the same counts and sizes, `data` set to where the bytes go (device,
//                stream and index as the memory is). NULL: the library allocates, or takes what is given; then `done`
//                shows the memory, valid until it returns. With NULL and no message described, it reads the next one
//                whole.
// Errors: INVALID (nothing described, counts or sizes that differ, a NULL), MEMORY, and as of a write, what the pipe
// failed with. Any thread.
TPRPC_API tprpc_status tprpc_pipe_read(tprpc_pipe *pipe, const tprpc_message *allocation, tprpc_read done, void *user);

// Closes this end: what is pending ends with CLOSED, the peer's with PEER. Asynchronous, legal anywhere, also in the
// pipe's own callbacks; the pointer is not valid after it. NULL is fine.
TPRPC_API void tprpc_pipe_close(tprpc_pipe *pipe);

typedef struct tprpc_path {          // one backend as a pipe sees it
    char    name[16];
    bool    channel;                 // false: a transport
    bool    chosen;
    char    why[110];                // when not chosen: why not; of the chosen channel: why a lane is missing
} tprpc_path;

typedef struct tprpc_pipe_info {
    char     transport[16];          // what carries the pipe; "" until agreed
    char     channel[16];            // what carries host tensors to the peer; "" until agreed
    char     peer[64];               // the peer's address, and its process where known
    uint64_t bytes_sent, bytes_received;           // on the wire of the transport, frames included
    uint64_t tensor_bytes_sent, tensor_bytes_received;   // of tensors and payloads, whatever moved them
    uint64_t messages_sent, messages_received;
    uint64_t fallbacks;              // transfers, sent or received, that went another way than the one chosen for them
    uint32_t path_count;             // of `paths`: the transports and channels known to this end, or the first 16; the
                                     // chosen ones are named above in any case
    uint32_t reserved;
    tprpc_path paths[16];
    tprpc_error error;               // why the pipe failed; status OK: it has not
    uint64_t tensor_bytes_adopted;   // of those received: the sender's own memory, given and not copied
} tprpc_pipe_info;

// Fills `out` (`size`: sizeof *out of the caller). Any thread. INVALID for a size that is none.
TPRPC_API tprpc_status tprpc_pipe_get_info(tprpc_pipe *pipe, tprpc_pipe_info *out, size_t size);

// ---- stores: where workers find each other --------------------------------------------------------------------------

typedef struct tprpc_store tprpc_store;
typedef struct tprpc_store_op tprpc_store_op;
typedef void (*tprpc_store_done)(tprpc_status status, const void *value, size_t size, const tprpc_error *error,
                                 void *user);

enum { TPRPC_STORE_SET = 1, TPRPC_STORE_GET, TPRPC_STORE_ADD, TPRPC_STORE_COMPARE_SET, TPRPC_STORE_DELETE };
typedef struct tprpc_store_request { // one operation, as a store's table sees it; valid until it is finished
    uint32_t    size; int32_t kind;  // TPRPC_STORE_*
    const char *key;                 // 1 to 255 bytes of UTF-8
    const void *value;    size_t value_size;      // SET and COMPARE_SET: what to store, at most 64 KiB
    const void *expected; size_t expected_size;   // COMPARE_SET: NULL means the key must not exist
    int64_t     delta;               // ADD
    int64_t     deadline_us;         // GET: wait for the key until then (context's clock); TPRPC_NOW, TPRPC_FOREVER
} tprpc_store_request;

// A user's own store. submit begins an operation (any thread, no lock held) and ends it, then or later, on any
// thread, by one tprpc_store_finish; cancel asks that it be ended soon (with CANCELLED); close is called when the
// store is closed, after the last operation has ended.
typedef struct tprpc_store_table {
    uint32_t size;                   // sizeof *this
    void (*submit)(void *user, tprpc_store_op *op, const tprpc_store_request *request);
    void (*cancel)(void *user, tprpc_store_op *op);
    void (*close)(void *user);
} tprpc_store_table;

typedef struct tprpc_store_desc {
    const char *url;                 // "tcp://host:port", "file://path", "env://", "local://" (default: none)
    bool        serve;               // tcp: this process serves it (default: false; env:// serves where RANK is 0)
    bool        insecure;            // allow an address other than loopback (default: false)
    int64_t     timeout_ms;          // to reach the server (default: 60,000)
    const tprpc_store_table *table;  // a store of the user's instead of url (default: NULL)
    void       *user;                // for the table (default: NULL)
} tprpc_store_desc;

// Opens a store on a context, which must be polled (or threaded) for it to make progress. "local://" lives in memory
// and is handed to other contexts of this process by its pointer. Errors: INVALID, UNREACHABLE (address in use),
// UNSUPPORTED, MEMORY. That a server is not there yet is no error: operations wait for it until timeout_ms.
TPRPC_API tprpc_status tprpc_store_open(tprpc_context *ctx, const tprpc_store_desc *desc, tprpc_store **out,
                                        tprpc_error *error);

// Closes it, which no agent may be using; what is pending ends with CLOSED. NULL is fine. The pointer is not valid
// after it.
TPRPC_API void tprpc_store_close(tprpc_store *store);

// The five below each begin an operation and return; `done` (NULL allowed) runs on the callback thread with the
// outcome. key: 1 to 255 bytes of UTF-8; value: at most 65,536 bytes, copied. Any thread.
// Errors: INVALID, LIMIT, MEMORY, CLOSED.

// Stores `size` bytes of `value` under the key. Shows nothing.
TPRPC_API tprpc_status tprpc_store_set(tprpc_store *store, const char *key, const void *value, size_t size,
                                       tprpc_store_done done, void *user);
// Waits until the key exists, at most timeout_ms (0 and TPRPC_NOW: does not wait), and shows its value.
// TIMEOUT names the key.
TPRPC_API tprpc_status tprpc_store_get(tprpc_store *store, const char *key, int64_t timeout_ms, tprpc_store_done done,
                                       void *user);
// Adds delta to the decimal number under the key (absent: 0) and shows the sum as an int64_t. INVALID when it is none.
TPRPC_API tprpc_status tprpc_store_add(tprpc_store *store, const char *key, int64_t delta, tprpc_store_done done,
                                       void *user);
// Stores value if the key holds `expected` (NULL: if it is absent), and shows what it holds afterwards: the caller
// compares. A value of size 0 is not absent.
TPRPC_API tprpc_status tprpc_store_compare_set(tprpc_store *store, const char *key, const void *expected,
                                               size_t expected_size, const void *value, size_t size,
                                               tprpc_store_done done, void *user);
// Removes the key; shows one byte, 1 when it was there, else 0.
TPRPC_API tprpc_status tprpc_store_delete(tprpc_store *store, const char *key, tprpc_store_done done, void *user);

// Runs one operation and waits for it, at most timeout_ms (0: the store's), driving the store's context: for threads
// that may wait. request: as the five above fill it; deadline_us is ignored in favour of timeout_ms. The value is
// copied to `out` (NULL allowed) of *out_size bytes, *out_size set to its whole size (LIMIT when it did not fit).
// TIMEOUT names the key.
TPRPC_API tprpc_status tprpc_store_wait(tprpc_store *store, const tprpc_store_request *request, int64_t timeout_ms,
                                        void *out, size_t *out_size, tprpc_error *error);

// For a store's table: ends an operation, exactly once. value is copied. error may be NULL.
TPRPC_API void tprpc_store_finish(tprpc_store_op *op, tprpc_status status, const void *value, size_t size,
                                  const tprpc_error *error);

// ---- agents -------------------------------------------------------------------------------------------------------

typedef struct tprpc_agent tprpc_agent;
typedef struct tprpc_future  { void *owner; uint64_t id; } tprpc_future;    // values; id 0: none. Stale use is INVALID
typedef struct tprpc_request { void *owner; uint64_t id; } tprpc_request;   // likewise; no thread may use one after
                                                                            // tprpc_agent_destroy has returned
typedef struct tprpc_stream { tprpc_device device; void *stream; } tprpc_stream;
typedef struct tprpc_method_id { uint32_t worker, method; } tprpc_method_id;   // resolved once; the wire carries ids

typedef void (*tprpc_handler)(tprpc_request request, const tprpc_message *message, void *user);
typedef void (*tprpc_done)(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user);
typedef struct tprpc_placement {
    uint32_t size; const tprpc_message *descriptor;
    tprpc_tensor *tensors;           // set `data` (and `stream`) to receive in place; NULL: the library's allocator
    const char *worker, *method; tprpc_request request;   // request.id 0: a reply
    void *cookie;                    // the user's; the same in place and on_unplaced
} tprpc_placement;
// place runs before tensor bytes arrive, on whichever thread moves them, one at a time per pipe, and calls no tprpc
// function; anything but TPRPC_OK refuses the message. Placed memory is the library's until the handler or on_done runs
// with it, or, when the message fails, until on_unplaced runs, exactly once, possibly after on_done.
typedef tprpc_status (*tprpc_place)(tprpc_placement *placement, void *user);
typedef void (*tprpc_unplaced)(const tprpc_placement *placement, void *user);

enum { TPRPC_METHOD_BLOCKING = 1 };                       // run by submit or on the agent's worker threads
enum { TPRPC_CALL_ONE_WAY = 1, TPRPC_CALL_IDEMPOTENT = 2 };

typedef struct tprpc_agent_desc {
    tprpc_context *context;          // (default: NULL, a private polled one)
    const char    *name;             // unique in the group, 1 to 128 bytes of UTF-8 (default: none, which is INVALID)
    const char    *init_method;      // "tcp://host:port", "file://path", "env://" (default: none; then store is set)
    int32_t        rank, world_size; // world_size 0: what init_method gives (env://: WORLD_SIZE); where it gives none,
                                     // a dynamic group. rank is read only when world_size is not 0 (default: 0, 0)
    tprpc_store   *store;            // instead of init_method; outlives the agent (default: NULL)
    bool           serve_store;      // a dynamic group's tcp://: this worker serves it; a static group's is served by
                                     // rank 0 (default: false)
    const char    *address;          // interface or address to publish, at most 255 bytes (default: what routes to
                                     // the store; loopback where the store has no host, which is INVALID with
                                     // `insecure`, but for local://)
    bool           insecure;         // allow an address other than loopback without a secret (default: false)
    const char    *secret;           // the group's shared secret (default: NULL)
    int32_t        worker_threads;   // for blocking handlers (default: 0, inline)
    int64_t        timeout_ms;       // of calls (default: 60,000)
    int64_t        start_timeout_ms; // of start and of leave (default: 60,000)
} tprpc_agent_desc;

typedef struct tprpc_method_desc {
    const char    *name;             // 1 to 128 bytes of UTF-8 (default: none, which is INVALID)
    tprpc_handler  handler;          // (default: none, which is INVALID)
    tprpc_place    place;            // (default: NULL, the library allocates)
    tprpc_unplaced on_unplaced;      // (default: NULL)
    void          *user;             // for the three (default: NULL)
    uint32_t       flags;            // TPRPC_METHOD_* (default: 0)
} tprpc_method_desc;

typedef struct tprpc_call_options {
    int64_t     timeout_ms;          // (default: the agent's)
    uint32_t    flags;
    uint32_t    lane;                // calls to one peer with the same lane, not 0, start in order; 0: no order
    tprpc_done  on_done;
    tprpc_place place;
    tprpc_unplaced on_unplaced;
    void       *user;
    const tprpc_stream *streams;     // copied; at most one per device: what tensors of the call that have none are read
                                     // in the order of, and the reply's written; UNSUPPORTED for a kind that no
                                     // converter of this context serves (default: the library's)
    size_t      stream_count;
    tprpc_error *error;              // where a refusal is written, in a sentence (default: NULL)
} tprpc_call_options;

// Creates an agent, which is local: register; then start or wait_ready joins the group; leave is graceful.
//   desc        copied, strings too; desc_size, version: sizeof(tprpc_agent_desc) and TPRPC_VERSION of the caller.
//   out         the agent, destroyed by the caller before its context.
// Errors: INVALID (names, sizes, an init_method that is none), UNSUPPORTED (a secret without TLS), MEMORY, LIMIT, and a
// private context's. Any thread.
TPRPC_API tprpc_status tprpc_agent_create_for(const tprpc_agent_desc *desc, size_t desc_size, int32_t version,
                                              tprpc_agent **out, tprpc_error *error);
static inline tprpc_status tprpc_agent_create(const tprpc_agent_desc *desc, tprpc_agent **out, tprpc_error *error) {
    return tprpc_agent_create_for(desc, sizeof *desc, TPRPC_VERSION, out, error);
}
// Ends every request (a kept one reads as cancelled), waits for handlers running or submitted, ends every operation and
// release on this thread; nothing runs after it, and no thread may use a future or request of it: join your own jobs
// first. INVALID, and nothing done, inside a callback. TIMEOUT when 30 s later a receiver of this process still has
// what was given to it (TPRPC_MESSAGE_GIVE): let it be done, and destroy again; nothing else may be done with the
// agent. NULL is fine.
TPRPC_API tprpc_status tprpc_agent_destroy(tprpc_agent *agent);

// Adds a method; desc is copied. Before or after start, any thread. INVALID: a name that is none, that is registered,
// or whose id is another's (names that it).
TPRPC_API tprpc_status tprpc_agent_register(tprpc_agent *agent, const tprpc_method_desc *desc, tprpc_error *error);

// After it returns, neither handler, place nor on_unplaced of that name runs; inside one of them it returns PENDING
// and takes effect when they have returned. Requests of it that were not started fail with NO_METHOD. Waits for
// handlers that run on other threads. NO_METHOD when it is not registered.
TPRPC_API tprpc_status tprpc_agent_unregister(tprpc_agent *agent, const char *method, tprpc_error *error);

// Joins the group: on_ready (NULL allowed) runs on the callback thread, with an error that names who is missing after
// start_timeout_ms. The store's host is looked up here, which may block. INVALID when started before.
TPRPC_API tprpc_status tprpc_agent_start(tprpc_agent *agent, tprpc_done on_ready, void *user, tprpc_error *error);

// Starts, if that was not done, and waits at most timeout_ms (0: start_timeout_ms) until all workers are there.
TPRPC_API tprpc_status tprpc_agent_wait_ready(tprpc_agent *agent, int64_t timeout_ms, tprpc_error *error);

// Leaves when all workers of a static group do: waits at most timeout_ms (0: start_timeout_ms) until every one has said
// that it leaves and no call of its own is running; meanwhile calls are served. TIMEOUT names who is missing. After it
// calls fail with CLOSED. A dynamic group's worker waits for its own calls alone and takes its name out of the store;
// calls that reach it after that fail with NO_WORKER. When the store cannot do that, leave has its error.
TPRPC_API tprpc_status tprpc_agent_leave(tprpc_agent *agent, int64_t timeout_ms, tprpc_error *error);

// Says where tensors of a call to `worker` go that leave it to the map (their target is DEFAULT): from[i] here to to[i]
// there. Adds to what was there, entry by entry: a later entry for the same device replaces the earlier. NULL worker:
// every worker that has no entry of its own for that device. Before start, any thread. Devices here are known and
// checked, those there when a tensor comes. A reply's tensors are not mapped: they go where the handler says. Errors,
// by which no entry is taken: INVALID, UNSUPPORTED (a kind that no converter of this context serves), MEMORY.
TPRPC_API tprpc_status tprpc_agent_set_device_map(tprpc_agent *agent, const char *worker, const tprpc_device *from,
                                                  const tprpc_device *to, size_t count, tprpc_error *error);

typedef struct tprpc_stats {
    uint64_t client_active_calls;    // begun here and not ended
    uint64_t server_active_calls;    // requests here not answered
    uint64_t server_active_async_calls;   // of those, kept to be answered later
    uint64_t calls, calls_failed, calls_timed_out, calls_cancelled;   // begun here, since start
    uint64_t late_replies;           // came after their call had ended, and were dropped
    uint64_t requests, requests_failed;   // received here, since start
    uint64_t fast_messages;          // calls and replies that took the short path
    uint64_t bytes_sent, bytes_received;  // of all its pipes, on the wire
    uint64_t tensor_bytes_sent, tensor_bytes_received;   // of all its pipes
    uint64_t memory_bytes;           // of the context, allocated now, as limits.memory_bytes counts it
    uint32_t workers, pipes;         // known; open, both directions
    uint64_t tensor_bytes_adopted;   // of tensor_bytes_received: the senders' own memory, given and not copied
} tprpc_stats;
// Fills `out` (`size`: sizeof *out of the caller). Any thread.
TPRPC_API tprpc_status tprpc_agent_get_stats(tprpc_agent *agent, tprpc_stats *out, size_t size);
// The pipe that calls to `worker` go over. NO_WORKER; UNREACHABLE when none is open. Any thread.
TPRPC_API tprpc_status tprpc_agent_get_peer_info(tprpc_agent *agent, const char *worker, tprpc_pipe_info *out,
                                                 size_t size);

// Calls `method` on `worker`. message NULL: an empty one; options NULL: defaults; out (NULL allowed): a future that
// the caller releases, {NULL, 0} on an error, which the functions of futures take. on_done runs on the callback
// thread exactly once, but for one-way calls, whose outcome is that the message left. Errors, by which no callback
// follows: INVALID, NO_WORKER, LIMIT, MEMORY, CLOSED, UNSUPPORTED. Any thread.
TPRPC_API tprpc_status tprpc_call(tprpc_agent *agent, const char *worker, const char *method,
                                  const tprpc_message *message, const tprpc_call_options *options, tprpc_future *out);
// Looks the two names up once, for tprpc_call_id, which is tprpc_call without it. NO_WORKER. Any thread.
TPRPC_API tprpc_status tprpc_resolve(tprpc_agent *agent, const char *worker, const char *method, tprpc_method_id *out,
                                     tprpc_error *error);
// tprpc_call with names looked up before: the same arguments, outcomes and errors. Any thread.
TPRPC_API tprpc_status tprpc_call_id(tprpc_agent *agent, tprpc_method_id id, const tprpc_message *message,
                                     const tprpc_call_options *options, tprpc_future *out);

// Waits at most timeout_ms (0 and TPRPC_NOW: only looks) for the call's outcome and returns it; PENDING: only the wait
// ended. Drives the loop meanwhile, as tprpc_poll does. INVALID: a stale future; LIMIT: waits nested in callbacks too
// deep (limits.nesting). Any thread.
TPRPC_API tprpc_status tprpc_future_wait(tprpc_future future, int64_t timeout_ms);
// Waits for the first of `count` futures of one context, and sets *which (NULL allowed) to it, whatever its outcome.
TPRPC_API tprpc_status tprpc_future_wait_any(const tprpc_future *futures, size_t count, int64_t timeout_ms,
                                             size_t *which);
// Waits for all of `count` futures of one context, at most timeout_ms in all; returns the first outcome, in their
// order, that is not OK.
TPRPC_API tprpc_status tprpc_future_wait_all(const tprpc_future *futures, size_t count, int64_t timeout_ms);
// The reply, valid until the future is released; NULL before there is one or when the call failed.
TPRPC_API const tprpc_message *tprpc_future_reply(tprpc_future future);
// Copies the outcome to *error and returns it; PENDING before there is one.
TPRPC_API tprpc_status tprpc_future_error(tprpc_future future, tprpc_error *error);
// Ends the call with CANCELLED and tells the peer; queues on_done, never inline. INVALID when it has ended.
TPRPC_API tprpc_status tprpc_future_cancel(tprpc_future future);
// Gives the future back; a call that is not done goes on, and on_done still runs.
TPRPC_API void         tprpc_future_release(tprpc_future future);

// A handler answers, or keeps the request to answer later from any thread. One that does neither fails the call.
// Requests are answered exactly once, by reply or fail: a second answer, one after the caller's time-out or after
// leave is INVALID.

// Answers with a message (NULL: an empty one). INVALID, LIMIT, MEMORY and UNSUPPORTED for a message that cannot be
// sent: the request is still to be answered. The message's release runs in any case. Any thread.
TPRPC_API tprpc_status tprpc_reply(tprpc_request request, const tprpc_message *message);
// Answers with a failure: the caller gets REMOTE with the code and the text (at most 199 bytes arrive). Any thread.
TPRPC_API tprpc_status tprpc_fail(tprpc_request request, int32_t user_code, const char *why);
// Keeps the request beyond its handler's return; inside the handler only. It must be answered before the agent goes.
// INVALID elsewhere, and where the agent has begun to leave: leaving has answered the request.
TPRPC_API tprpc_status tprpc_request_keep(tprpc_request request);
// Whether nobody waits for the answer: the caller cancelled, timed out or died, or it was answered. Any thread.
TPRPC_API bool         tprpc_request_cancelled(tprpc_request request);
// The caller's name, valid until the agent is destroyed; NULL for a stale request. Any thread.
TPRPC_API const char  *tprpc_request_caller(tprpc_request request);
// The message as the handler saw it, valid until the request is answered, also after the caller's time-out. Any thread.
TPRPC_API const tprpc_message *tprpc_request_message(tprpc_request request);
// The stream that the request's tensors on a device of this worker are ordered on, the library's; NULL for a stale
// request, and where there is no such device or its kind has no streams. Any thread.
TPRPC_API void        *tprpc_request_stream(tprpc_request request, tprpc_device device);

// ---- reports --------------------------------------------------------------------------------------------------------

// Writes what a person reads: the agent's counts, and each peer with its transport, channel, bytes and why not
// another, a line each; at most `size` bytes with the final 0. Returns the bytes of a whole report, without it.
// Any thread.
TPRPC_API size_t tprpc_agent_report(tprpc_agent *agent, char *out, size_t size);
// The same for one pipe's info.
TPRPC_API size_t tprpc_pipe_report(const tprpc_pipe_info *info, char *out, size_t size);

// ---- backends: what one's own transports, channels and converters are made of ---------------------------------------
//
// A backend is one const table of functions. The library opens an instance of it for every loop of a context. All
// functions of an instance, and of the connections, listeners and ends that hang from it, are called one at a time,
// by whichever thread drives the loop, with the loop's lock held: they must not block, and they call nothing of tprpc
// but what this part offers. Work that ends elsewhere (a driver's thread, a timer) comes back in by tprpc_defer.

typedef struct tprpc_backend {       // const; outlives the context
    uint32_t size; int32_t version;  // sizeof *this and TPRPC_VERSION of the code that made it
    const char *name, *summary;      // at most 15 bytes; one sentence
    int32_t priority;                // the larger is tried first, among transports and among channels
    const struct tprpc_transport_table *transport;   // exactly one of the three is set
    const struct tprpc_channel_table   *channel;
    const struct tprpc_converter_table *converter;
    void *user;
} tprpc_backend;

typedef struct tprpc_host {          // what an instance is given; valid until it is closed
    uint32_t       size;
    uint32_t       loop;             // of context; goes into tprpc_work.loop
    tprpc_context *context;
} tprpc_host;

typedef struct tprpc_work {
    struct tprpc_work *next;         // the library's
    void (*run)(struct tprpc_work *work);
    int64_t  due_us;                 // the library's; set by tprpc_defer_at
    uint32_t loop;                   // which loop runs it (default: 0, the first)
    uint32_t state;                  // the library's; 0 before the first use
    struct tprpc_work *prev;         // the library's
} tprpc_work;
// Deferred work: `run` is called once by the loop's driver, under the loop's lock, after whatever it does now. The
// struct is the caller's, untouched until run is called, and may be freed in it. Nothing is allocated, so a full
// machine does not lose it. Any thread or driver callback; wakes the loop when it sleeps.
TPRPC_API void    tprpc_defer(tprpc_context *ctx, tprpc_work *work);
TPRPC_API void    tprpc_defer_at(tprpc_context *ctx, tprpc_work *work, int64_t due_us);   // not before due_us
TPRPC_API int64_t tprpc_now_us(tprpc_context *ctx);                         // the context's clock; any thread

// The context's allocator, counted against limits.memory_bytes. align: a power of two, at most 4,096. NULL: no memory.
TPRPC_API void *tprpc_alloc(tprpc_context *ctx, size_t size, size_t align, uint32_t tag);
TPRPC_API void  tprpc_free(tprpc_context *ctx, void *ptr, size_t size, uint32_t tag);   // NULL is fine

// Writes a line to the context's log; section names the backend. Any thread. The strings are copied.
TPRPC_API void tprpc_log_text(tprpc_context *ctx, int32_t level, const char *section, const char *text);

// Fills *error (NULL allowed) and returns status. text is printf-like.
TPRPC_API tprpc_status tprpc_error_set(tprpc_error *error, tprpc_status status, int32_t os_code, const char *text, ...)
    __attribute__((format(printf, 4, 5)));

typedef struct tprpc_span { void *data; size_t size; } tprpc_span;          // one piece of a gather or a scatter

// ---- transports: ordered byte streams

enum { TPRPC_EVENT_OPEN = 1,         // a connection begun by connect is established
       TPRPC_EVENT_RECV = 2,         // bytes, or handles, have come; may be repeated until they are consumed
       TPRPC_EVENT_SEND = 4,         // there is room again after send took less than offered
       TPRPC_EVENT_LOST = 8 };       // the connection is over, error says why; bytes received before may still be
                                     // consumed

// Who owns a connection. The transport calls event from progress or deferred work, never from inside a function of the
// same connection; the owner may call any function of the connection in it, close included.
typedef struct tprpc_conn_owner {
    void (*event)(struct tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error);
} tprpc_conn_owner;

// Who owns a listener. accepted hands over a connection that is established; the owner sets its own owner at once.
typedef struct tprpc_listen_owner {
    void (*accepted)(struct tprpc_listen_owner *owner, void *conn);
} tprpc_listen_owner;

enum { TPRPC_TRANSPORT_HANDLES = 1,      // passes descriptors
       TPRPC_TRANSPORT_SAME_HOST = 2,    // never leaves this host: the peer's user was checked by the transport
       TPRPC_TRANSPORT_LOCAL_COPY = 4,   // the ends share memory: a byte moved is a byte copied by a CPU
       TPRPC_TRANSPORT_HOST_PORT = 8,    // its addresses are "host:port"; an agent listens on port 0 of the group's
                                         // interface
       TPRPC_TRANSPORT_REPEATS = 16,     // every progress says RECV again until all bytes are consumed
       TPRPC_TRANSPORT_LANES = 32 };     // a second connection between two ends is worth having: what fills one does
                                         // not hold up the other

typedef struct tprpc_transport_table {
    uint32_t size;                   // sizeof *this
    uint32_t flags;                  // TPRPC_TRANSPORT_*

    // An instance for one loop. An error means: not viable here, and its text is shown as the reason, and logged unless
    // it is CANCELLED, for what the user has to ask for and did not.
    tprpc_status (*open)(const tprpc_host *host, void *user, void **instance, tprpc_error *error);
    void         (*close)(void *instance);       // all connections and listeners are closed by then

    // What it can reach, as bytes that the two ends compare: domain writes at most `capacity` (64) bytes and returns
    // how many; reaches says whether a peer's domain is within reach.
    size_t       (*domain)(void *instance, uint8_t *out, size_t capacity);
    bool         (*reaches)(void *instance, const uint8_t *domain, size_t size);

    // Readiness. progress does what can be done at once and returns whether anything was; it also ends being armed.
    // arm prepares for sleep: false means busy, call progress again; true means that `handle` turns readable when
    // there is something to do. handle: a descriptor that poll(2) understands, -1 when it needs none (then arm lowers
    // *deadline_us, of the context's clock, to when it must be called at the latest).
    bool         (*progress)(void *instance);
    bool         (*arm)(void *instance, int64_t *deadline_us);
    intptr_t     (*handle)(void *instance);

    // Addresses come without the "name://". listen: empty means choose one. address: what connect takes, in `capacity`
    // bytes with the final 0. public_address: whether peers of other hosts could reach that address.
    tprpc_status (*listen)(void *instance, const char *address, tprpc_listen_owner *owner, void **listener,
                           tprpc_error *error);
    size_t       (*address)(void *listener, char *out, size_t capacity);
    void         (*unlisten)(void *listener);
    bool         (*public_address)(void *instance, const char *address);

    // connect may block for a name's look-up alone. lane 0 carries control and small messages; further lanes, where the
    // transport is worth having them (TPRPC_TRANSPORT_LANES), bulk, so that a network can tell them apart; what they
    // connect to is the address that lane 0 had, or for HOST_PORT what `peer` says. It ends in one OPEN or one LOST
    // event, unless closed before.
    tprpc_status (*connect)(void *instance, const char *address, uint32_t lane, tprpc_conn_owner *owner, void **conn,
                            tprpc_error *error);
    void         (*own)(void *conn, tprpc_conn_owner *owner);

    // send takes what it can at once, of spans in order, and returns how many bytes; less than all: a SEND event
    // follows. more: further bytes follow at once, so these need not be published yet. handles (at most 8;
    // duplicated, the caller keeps his) travel with the first byte and need it taken. It never fails: a broken
    // connection takes everything and reports LOST.
    size_t (*send)(void *conn, const tprpc_span *spans, size_t count, const intptr_t *handles, size_t handle_count,
                   bool more);
    // peek shows received bytes in place, as many as are contiguous (size 0: none); the peer may still write to them
    // where memory is shared, so copy, then check. consume gives them back. recv copies or receives straight into
    // spans, and returns how many bytes. take_handles: descriptors in the order sent, owned by the caller.
    tprpc_span   (*peek)(void *conn);
    void         (*consume)(void *conn, size_t size);
    size_t       (*recv)(void *conn, const tprpc_span *spans, size_t count);
    size_t       (*take_handles)(void *conn, intptr_t *out, size_t capacity);

    // Who is at the other end, for messages ("127.0.0.1:40312", "process 4711"), and whether it is this user as the
    // trust part of the manual demands: DENIED when it is another, PEER when it has gone, UNSUPPORTED when it cannot be
    // told, OK on transports beyond the host.
    size_t       (*peer)(void *conn, char *out, size_t capacity);
    tprpc_status (*check_peer)(void *conn, tprpc_error *error);
    // The process at the other end, by its number in this process's namespace and as the system vouches for it; 0: it
    // cannot be told. NULL: never.
    int32_t      (*process)(void *conn);

    // Ends it. Bytes taken are still delivered where the medium can; the cause is for the medium, the peer's owner
    // gets LOST.
    void         (*disconnect)(void *conn, tprpc_status cause);
} tprpc_transport_table;

// ---- channels: batches of buffers between memories

typedef struct tprpc_buffer { void *data; size_t size; tprpc_device device; void *stream; } tprpc_buffer;
typedef struct tprpc_link tprpc_link;        // what a channel's end talks to its twin through
typedef struct tprpc_transfer {      // one batch on its way; the library's, valid until tprpc_transfer_done
    uint64_t id;                     // the same at both ends of a pipe and direction
    void    *channel_data;           // the channel's own (default: NULL)
    uint32_t flags;                  // TPRPC_TRANSFER_*
} tprpc_transfer;
enum { TPRPC_TRANSFER_GIVEN = 1 };   // of a send: its buffers may be adopted

typedef struct tprpc_allocation {    // memory by identity: the same base and id mean the same memory
    const void *base; size_t size; uint64_t id; tprpc_device device;
} tprpc_allocation;

enum { TPRPC_CHANNEL_MUTUAL = 1,     // usable in a direction only when both ends proved each other
       TPRPC_CHANNEL_RATED = 2 };    // of those that say so and can move a batch, the pipe takes the one that was
                                     // faster with large ones, unless the user gave an order

typedef struct tprpc_channel_table {
    uint32_t size;                   // sizeof *this
    uint32_t flags;                  // TPRPC_CHANNEL_*
    uint32_t inline_bytes;           // host buffers up to here are better sent within the message than by this channel
                                     // (0: as the manual's limits say; more than their sum counts as that)
    uint32_t alignment;              // of a sender's addresses and of sizes that it can move (0 and 1: any)
    uint64_t max_bytes;              // the largest buffer it moves (0: any). What does not fit goes by the next channel
    uint32_t max_descriptor;         // the most bytes of its own that it puts into a message; over 4,096 is INVALID

    tprpc_status (*open)(const tprpc_host *host, void *user, void **instance, tprpc_error *error);   // as a transport's
    void         (*close)(void *instance);
    size_t       (*domain)(void *instance, uint8_t *out, size_t capacity);
    bool         (*reaches)(void *instance, const uint8_t *domain, size_t size);
    bool         (*progress)(void *instance);    // these three may be NULL when it never has work of its own
    bool         (*arm)(void *instance, int64_t *deadline_us);
    intptr_t     (*handle)(void *instance);
    bool         (*moves)(void *instance, tprpc_device from, tprpc_device to);   // sender's device to receiver's

    // One end on one pipe. attach is called at both ends once the pipe is agreed; detach after the last transfer ended.
    tprpc_status (*attach)(void *instance, tprpc_link *link, void **end, tprpc_error *error);
    void         (*detach)(void *end);

    // The proof, before user data moves: challenge writes bytes for the twin (at most 256; 0: needs none); answer shows
    // that the twin's challenge was met by really moving it; verify judges the answer to one's own challenge. Proven by
    // verify: that the twin can read what this end sends. The three may be NULL together.
    size_t       (*challenge)(void *end, uint8_t *out, size_t capacity);
    size_t       (*answer)(void *end, const uint8_t *challenge, size_t size, uint8_t *out, size_t capacity);
    tprpc_status (*verify)(void *end, const uint8_t *answer, size_t size, tprpc_error *error);

    // Begins a transfer of `count` buffers, whose array is valid during the call, whose memory until the transfer is
    // done. send writes up to max_descriptor bytes that travel within the message; recv gets them at the other end.
    // Each ends in one tprpc_transfer_done, during the call or later, unless it returns an error. A message that is
    // refused is received and at once aborted, with data NULL: recv itself touches no buffer.
    tprpc_status (*send)(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                         uint8_t *descriptor, size_t *descriptor_size, tprpc_error *error);
    tprpc_status (*recv)(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                         const uint8_t *descriptor, size_t descriptor_size, tprpc_error *error);
    // Asks that a transfer in flight end soon, with CANCELLED: tprpc_transfer_done follows once its memory is
    // untouched. link_lost: the twin is gone, nothing more will come from it.
    void         (*abort)(void *end, tprpc_transfer *transfer, bool link_lost);

    // From the twin: control bytes, in order; and bulk bytes of a transfer, for which bulk says where they go (NULL:
    // they are dropped) and bulk_done that they are there. All of it may be wrong or hostile.
    tprpc_status (*control)(void *end, const uint8_t *bytes, size_t size, const intptr_t *handles, size_t handle_count);
    void        *(*bulk)(void *end, uint64_t transfer, uint64_t offset, size_t size);
    void         (*bulk_done)(void *end, uint64_t transfer, uint64_t offset, size_t size);

    // Prepares memory that will be sent or received often; by allocation identity, cached by the channel. NULL: needs
    // none. In this version, in which nothing names an allocation to the library, neither is called: a channel that
    // registers memory does so for the buffers that send and recv are given.
    tprpc_status (*register_memory)(void *instance, const tprpc_allocation *allocation, tprpc_error *error);
    void         (*deregister_memory)(void *instance, const tprpc_allocation *allocation);

    // Buffers that were given may be shown to a receiver of this process in place. adopt comes before the recv of the
    // transfer of that id, with its buffers as recv will get them, but for those for which there is no memory yet: of
    // these, whose data is NULL and whose size is not 0, it sets `data` to the sender's, where that is 64-byte aligned.
    // Returns NULL when it set none, else a hold, and recv then moves the others alone. The sender's transfer is not
    // done before let_go is called with that hold, once, maybe long after recv and detach. Both may be NULL, together.
    void        *(*adopt)(void *end, uint64_t transfer, tprpc_buffer *buffers, size_t count);
    void         (*let_go)(void *instance, void *hold);

    // Connections beside the pipe's own over which its large bulk may go (more than the context has count as that). 0:
    // none, and its bulk comes in the order sent; else in any order.
    uint32_t lanes;
} tprpc_channel_table;

// What a channel calls, in its functions or in deferred work, for the loop of its link.

// Sends bytes (at most 4,096, copied) and handles (at most 8, duplicated) to the twin's control. LIMIT; UNSUPPORTED
// where the pipe's transport passes no handles; MEMORY, or what the pipe failed with.
TPRPC_API tprpc_status tprpc_link_control(tprpc_link *link, const void *bytes, size_t size, const intptr_t *handles,
                                          size_t handle_count);
// Sends bytes of a transfer, borrowed until taken->run is called, in chunks that small messages overtake. MEMORY, or
// what the pipe failed with; then `taken` is not called.
TPRPC_API tprpc_status tprpc_link_bulk(tprpc_link *link, uint64_t transfer, uint64_t offset, const void *data,
                                       size_t size, tprpc_work *taken);
// Whether control can pass handles.
TPRPC_API bool         tprpc_link_handles(tprpc_link *link);
// What the pipe's transport is: TPRPC_TRANSPORT_*.
TPRPC_API uint32_t     tprpc_link_transport(tprpc_link *link);
// The twin's process, as the pipe's transport says (tprpc_transport_table.process); 0: it cannot be told.
TPRPC_API int32_t      tprpc_link_process(tprpc_link *link);
// Ends a transfer, exactly once: its memory is not touched any more. error: NULL when status is TPRPC_OK; copied.
TPRPC_API void         tprpc_transfer_done(tprpc_transfer *transfer, tprpc_status status, const tprpc_error *error);

// ---- converters: memory of a kind of device, for the agent

typedef struct tprpc_converter_table {
    uint32_t size;                   // sizeof *this
    int32_t  kind;                   // TPRPC_CPU, TPRPC_CUDA, TPRPC_DEVICE_USER and above
    int32_t (*device_count)(void *user);
    // The library's stream of a device for a call, NULL where the kind has none.
    void   *(*stream)(void *user, tprpc_context *ctx, tprpc_device device);
    // Before a tensor is sent: makes it fit to be (its stream, say) and keeps its memory alive until sent is called
    // with the keep it set.
    tprpc_status (*prepare)(void *user, tprpc_context *ctx, tprpc_tensor *tensor, void **keep, tprpc_error *error);
    void         (*sent)(void *user, tprpc_context *ctx, void *keep);
    // Copies a tensor that was not lent, in the order of its stream, to memory that release gives back.
    tprpc_status (*copy)(void *user, tprpc_context *ctx, const tprpc_tensor *tensor, void **data, tprpc_error *error);
    // Memory for tensor->size bytes on tensor->device in the order of tensor->stream, into tensor->data.
    tprpc_status (*allocate)(void *user, tprpc_context *ctx, tprpc_tensor *tensor, tprpc_error *error);
    // Gives memory back in the order of a stream, for what is queued may still use it: the one that it was allocated
    // on or, of a copy, that it is sent on (the tensor's, as prepare left it).
    void         (*release)(void *user, tprpc_context *ctx, tprpc_device device, void *data, size_t size, void *stream);
} tprpc_converter_table;

#ifdef __cplusplus
}
#endif

// ---- C++: references where C has compound literals

#ifdef __cplusplus
inline tprpc_status tprpc_context_create(const tprpc_context_desc &desc, tprpc_context **out, tprpc_error *error) {
    return tprpc_context_create(&desc, out, error);
}
inline tprpc_status tprpc_agent_create(const tprpc_agent_desc &desc, tprpc_agent **out, tprpc_error *error) {
    return tprpc_agent_create(&desc, out, error);
}
inline tprpc_status tprpc_agent_register(tprpc_agent *agent, const tprpc_method_desc &desc, tprpc_error *error) {
    return tprpc_agent_register(agent, &desc, error);
}
inline tprpc_status tprpc_listen(tprpc_context *ctx, const tprpc_listener_desc &desc, tprpc_listener **out,
                                 tprpc_error *error) {
    return tprpc_listen(ctx, &desc, out, error);
}
inline tprpc_status tprpc_connect(tprpc_context *ctx, const tprpc_pipe_desc &desc, tprpc_pipe **out,
                                  tprpc_error *error) {
    return tprpc_connect(ctx, &desc, out, error);
}
inline tprpc_status tprpc_pipe_write(tprpc_pipe *pipe, const tprpc_message &message, tprpc_written done, void *user) {
    return tprpc_pipe_write(pipe, &message, done, user);
}
inline tprpc_status tprpc_call(tprpc_agent *agent, const char *worker, const char *method, const tprpc_message &message,
                               const tprpc_call_options &options = tprpc_call_options(), tprpc_future *out = nullptr) {
    return tprpc_call(agent, worker, method, &message, &options, out);
}
inline tprpc_status tprpc_reply(tprpc_request request, const tprpc_message &message) {
    return tprpc_reply(request, &message);
}
#endif

#endif // TPRPC_H

// ---- DLPack: when dlpack.h was included before ----------------------------------------------------------------------

#if defined(DLPACK_VERSION) || defined(DLPACK_MAJOR_VERSION)
#ifndef TPRPC_DLPACK_H
#define TPRPC_DLPACK_H
#ifdef __cplusplus
extern "C" {
#endif
// Shows a DLPack tensor as ours, without a copy: byte_offset applied, shape and dtype mapped, on CPU, CUDA pinned
// host (as CPU) or CUDA memory. On success `message` (NULL allowed) has release and release_user set so that the
// deleter runs once, when the library is done; without it the caller runs the deleter. UNSUPPORTED, by name, for
// strides that are not contiguous, lanes other than 1, types below a byte, more than TPRPC_MAX_DIMS dimensions and
// other devices; the managed tensor is untouched then. Any thread.
TPRPC_API tprpc_status tprpc_from_dlpack(DLManagedTensor *managed, tprpc_tensor *out, tprpc_message *message,
                                         tprpc_error *error);
// Shows a tensor of ours as a DLPack tensor, whose shape array the caller provides (TPRPC_MAX_DIMS entries) and keeps
// alive with it. UNSUPPORTED for kinds that DLPack does not know. Any thread.
TPRPC_API tprpc_status tprpc_to_dlpack(const tprpc_tensor *tensor, DLTensor *out, int64_t *shape, tprpc_error *error);
#ifdef __cplusplus
}
#endif
#endif // TPRPC_DLPACK_H
#endif

// ====================================================================================================================
// The implementation
// ====================================================================================================================

#if defined(TPRPC_IMPLEMENTATION) && !defined(TPRPC_IMPLEMENTED)
#define TPRPC_IMPLEMENTED

// The implementation needs _GNU_SOURCE. Our own <stdint.h> above came without it and is told so; another header of the
// system's that came without has declared too little, and only the user can mend that.
#if !defined(_GNU_SOURCE) && defined(_FEATURES_H) && (defined(_STRING_H) || defined(_STDIO_H) || defined(_STDLIB_H) || \
    defined(_UNISTD_H) || defined(_FCNTL_H) || defined(_TIME_H) || defined(_SYS_TYPES_H) || defined(_ERRNO_H) || \
    defined(_ASSERT_H) || defined(_PTHREAD_H) || defined(_SYS_SOCKET_H) || defined(_SIGNAL_H) || defined(_MATH_H))
#error "tprpc: a system header came before the implementation: define _GNU_SOURCE above it, or include tprpc.h first"
#else

#if defined(__GNUC__) && defined(__cplusplus)
// The implementation is C that C++ also compiles: its casts and zero initialisers are C's.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wold-style-cast"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#endif

#ifdef __cplusplus
#define TPR_ZERO {}
#else
#define TPR_ZERO {0}
#endif

#ifndef TPRPC_LOG_LEVEL
#define TPRPC_LOG_LEVEL 3     // levels above are compiled out
#endif

#ifndef TPRPC_ZONE_BEGIN      // a profiler's zones: on one thread, nested; the name is a literal
#define TPRPC_ZONE_BEGIN(name) ((void)0)
#define TPRPC_ZONE_END(name)   ((void)0)
#endif
#ifndef TPRPC_SPAN_BEGIN      // asynchronous spans: begun and ended anywhere, matched by id (a uint64_t)
#define TPRPC_SPAN_BEGIN(name, id) ((void)(id))
#define TPRPC_SPAN_END(name, id)   ((void)(id))
#endif
#ifndef TPRPC_PLOT            // a number over time (an int64_t)
#define TPRPC_PLOT(name, value) ((void)(value))
#endif

#define TPR_UNUSED __attribute__((unused))
#define TPR_COLD __attribute__((cold, noinline))   // off the beaten track: made small, and what leads there is unlikely
#define TPR_APART __attribute__((noinline))       // rare beside its caller, which saves no registers for it
#define TPR_LIKELY(x)   __builtin_expect(!!(x), 1)
#define TPR_UNLIKELY(x) __builtin_expect(!!(x), 0)
#define TPR_CONTAINER(ptr, type, member) ((type *)(void *)((char *)(ptr) - offsetof(type, member)))
#define TPR_COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define TPR_TAG(a, b, c, d) ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)

#ifdef __cplusplus
extern "C" {
#endif

// >>atomic ------------------------------------------------------------------------------------------------------------
// Atomic operations on plain objects, by the compiler's builtins: the one form that C99, C11 and C++11 all compile.
//
// Uses: nothing.
// Invariant: an object that one thread touches by these is touched by no thread in another way. There is no stand-alone
// fence (ThreadSanitizer does not know them): a full barrier is a sequentially consistent exchange.

#if !defined(__GNUC__)
#error "tprpc: the atomic section needs the __atomic builtins of gcc or clang; add your compiler's there"
#endif

#define TPR_ATOMIC_LOAD(p)          __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define TPR_ATOMIC_PEEK(p)          __atomic_load_n((p), __ATOMIC_RELAXED)
#define TPR_ATOMIC_LOAD_FULL(p)     __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define TPR_ATOMIC_STORE(p, v)      __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define TPR_ATOMIC_POKE(p, v)       __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define TPR_ATOMIC_STORE_FULL(p, v) ((void)__atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST))   // a store and a barrier
#define TPR_ATOMIC_SWAP(p, v)       __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
#define TPR_ATOMIC_ADD(p, v)        __atomic_fetch_add((p), (v), __ATOMIC_SEQ_CST)
#define TPR_ATOMIC_SUB(p, v)        __atomic_fetch_sub((p), (v), __ATOMIC_SEQ_CST)

// Puts `to` where `*expected` was found; otherwise sets *expected to what is there.
#define TPR_ATOMIC_CAS(p, expected, to) \
    __atomic_compare_exchange_n((p), (expected), (to), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)

// Tells the processor that this is a spin loop.
static inline void tpr_atomic_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// Fetches the line of p into the cache.
static inline void tpr_atomic_prefetch(const void *p) { __builtin_prefetch(p); }

// >>os ----------------------------------------------------------------------------------------------------------------
// The operating system: every system call, through one function each, so that a test can make any of them fail.
//
// Uses: atomic.
// Invariant: functions that return int give -1 with errno set on failure; no descriptor is born without close-on-exec;
// sockets are non-blocking and raise no SIGPIPE. Marked unused is what a build without some backend does not need.

#if defined(__linux__)
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#ifdef _FEATURES_H   // the public part's <stdint.h> came without it: glibc decides anew
#undef _FEATURES_H
#include <features.h>
#endif
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/inet_diag.h>
#include <linux/magic.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>
#ifndef TPRPC_NO_THREADS
#include <pthread.h>
#endif
#else
#error "tprpc: the os section knows Linux alone; add your system's calls there"
#endif

#ifndef TPRPC_ASSERT
#ifdef NDEBUG
#define TPRPC_ASSERT(condition) ((void)0)
#else
#include <assert.h>
#define TPRPC_ASSERT(condition) assert(condition)
#endif
#endif

#ifdef TPRPC_TEST_HOOKS
// A test's hand on every system call and allocation: called before it with its name; returns 0 to let it happen or an
// errno to fail it with. *size, where the call has a size or a time-out in us, may be lowered; what fstatfs_type tells
// of a memory descriptor may be any. Calls that give something back (close, munmap, shutdown, epoll_del, futex_wake)
// cannot fail: of them it is told.
int (*tprpc_test_hook)(const char *call, int64_t *size);
static int tpr_os_hooked(const char *call, int64_t *size) {
    int64_t none = 0;
    int (*hook)(const char *, int64_t *) = TPR_ATOMIC_LOAD(&tprpc_test_hook);
    int code = hook ? hook(call, size ? size : &none) : 0;
    if (code) errno = code;
    return code;
}
#define TPR_OS_HOOKED(call, size) tpr_os_hooked(call, size)
#else
#define TPR_OS_HOOKED(call, size) ((void)(call), (void)(size), 0)
#endif
#define TPR_OS_NO_SIZE ((int64_t *)NULL)

enum { TPR_OS_SPANS = 16, TPR_OS_HANDLES = 8, TPR_OS_RETRIES = 100 };   // of a call that signals keep interrupting

// ---- locks, threads, time

// A futex lock: 0 free, 1 held, 2 held and waited for. No pthread mutex, so that a build without threads needs none.
typedef struct tpr_os_lock { uint32_t state; } tpr_os_lock;

TPR_UNUSED static int tpr_os_futex_wait(uint32_t *word, uint32_t value, int64_t timeout_us) {   // negative: no limit
    struct timespec ts;
    ts.tv_sec = (time_t)(timeout_us / 1000000);
    ts.tv_nsec = (long)(timeout_us % 1000000 * 1000);
    if (TPR_OS_HOOKED("futex_wait", TPR_OS_NO_SIZE)) return -1;
    return (int)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, timeout_us < 0 ? NULL : &ts, NULL, 0);
}

TPR_COLD TPR_UNUSED static void tpr_os_futex_wake(uint32_t *word, int count) {
    (void)TPR_OS_HOOKED("futex_wake", TPR_OS_NO_SIZE);
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static inline bool tpr_os_trylock(tpr_os_lock *lock) {
    uint32_t expected = 0;
    return TPR_ATOMIC_CAS(&lock->state, &expected, 1u);
}

TPR_COLD TPR_UNUSED static void tpr_os_lock_await(tpr_os_lock *lock) {
    for (int i = 0; i < 100; i++) {
        if (TPR_ATOMIC_PEEK(&lock->state) == 0 && tpr_os_trylock(lock)) return;
        tpr_atomic_pause();
    }
    while (TPR_ATOMIC_SWAP(&lock->state, 2u) != 0) tpr_os_futex_wait(&lock->state, 2, -1);
}

static inline void tpr_os_lock_take(tpr_os_lock *lock) {
    if (TPR_UNLIKELY(!tpr_os_trylock(lock))) tpr_os_lock_await(lock);
}

static inline void tpr_os_lock_give(tpr_os_lock *lock) {
    if (TPR_UNLIKELY(TPR_ATOMIC_SWAP(&lock->state, 0u) == 2)) tpr_os_futex_wake(&lock->state, 1);
}

// Names the running thread: no two that live at once share their errno.
static inline uintptr_t tpr_os_thread_id(void) { return (uintptr_t)&errno; }

#ifndef TPRPC_NO_THREADS
typedef struct tpr_os_thread { pthread_t id; void (*run)(void *); void *arg; } tpr_os_thread;

TPR_UNUSED static void *tpr_os_thread_main(void *arg) {
    tpr_os_thread *thread = (tpr_os_thread *)arg;
    thread->run(thread->arg);
    return NULL;
}

// Starts `thread`, which stays where it is until it was joined.
TPR_UNUSED static int tpr_os_thread_start(tpr_os_thread *thread, void (*run)(void *), void *arg) {
    if (TPR_OS_HOOKED("pthread_create", TPR_OS_NO_SIZE)) return -1;
    thread->run = run;
    thread->arg = arg;
    int code = pthread_create(&thread->id, NULL, tpr_os_thread_main, thread);
    if (code) errno = code;
    return code ? -1 : 0;
}

TPR_UNUSED static void tpr_os_thread_join(tpr_os_thread *thread) { pthread_join(thread->id, NULL); }
#endif

TPR_UNUSED static int64_t tpr_os_now_us(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

// ---- the process

TPR_UNUSED static int tpr_os_random(void *out, size_t size) {
    for (int i = 0; i < TPR_OS_RETRIES; i++) {
        ssize_t n = TPR_OS_HOOKED("getrandom", TPR_OS_NO_SIZE) ? -1 : getrandom(out, size, 0);
        if (n == (ssize_t)size) return 0;
        if (n < 0 && errno != EINTR) return -1;
    }
    errno = EIO;
    return -1;
}

TPR_UNUSED static uint32_t tpr_os_user(void) { return (uint32_t)geteuid(); }
TPR_UNUSED static int32_t tpr_os_pid(void) { return (int32_t)getpid(); }

TPR_UNUSED static const char *tpr_os_env(const char *name) {
#ifdef TPRPC_NO_GETENV
    (void)name;
    return NULL;
#else
    return getenv(name);
#endif
}

// A page that a fork's child finds zeroed, so that `*page != 0` asks without a system call whether this is the process
// that made it. NULL where the kernel (before 4.14) cannot.
TPR_UNUSED static uint32_t *tpr_os_fork_page(void) {
    if (TPR_OS_HOOKED("mmap", TPR_OS_NO_SIZE)) return NULL;
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return NULL;
    if (TPR_OS_HOOKED("madvise", TPR_OS_NO_SIZE) || madvise(page, size, MADV_WIPEONFORK) != 0) {
        munmap(page, size);
        return NULL;
    }
    return (uint32_t *)page;
}

TPR_UNUSED static void tpr_os_fork_page_free(uint32_t *page) {
    if (!page) return;
    (void)TPR_OS_HOOKED("munmap", TPR_OS_NO_SIZE);
    munmap(page, (size_t)sysconf(_SC_PAGESIZE));
}

// ---- files

TPR_COLD TPR_UNUSED static void tpr_os_close(int fd) {
    if (fd < 0) return;
    (void)TPR_OS_HOOKED("close", TPR_OS_NO_SIZE);
    close(fd);
}

TPR_UNUSED static int tpr_os_duplicate(int fd) {
    if (TPR_OS_HOOKED("dup", TPR_OS_NO_SIZE)) return -1;
    return fcntl(fd, F_DUPFD_CLOEXEC, 0);
}

#ifndef TPRPC_NO_FILES
// Reads a small file whole, at most size - 1 bytes, with a final 0. Returns how many bytes, -1 on failure.
TPR_UNUSED static int tpr_os_read_file(const char *path, char *out, size_t size) {
    if (TPR_OS_HOOKED("open", TPR_OS_NO_SIZE)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t n = TPR_OS_HOOKED("read", TPR_OS_NO_SIZE) ? -1 : read(fd, out, size - 1);
    int code = errno;
    close(fd);
    errno = code;
    if (n < 0) return -1;
    out[n] = 0;
    return (int)n;
}
#endif

#ifndef TPRPC_NO_FILES
// A number in a file of a control group, after `name` where there is one; UINT64_MAX: none.
TPR_COLD TPR_UNUSED static uint64_t tpr_os_group_number(const char *folder, const char *path, size_t length,
                                                        const char *file, const char *name) {
    char at[512], text[4096];
    snprintf(at, sizeof at, "%s%.*s/%s", folder, (int)length, path, file);
    if (tpr_os_read_file(at, text, sizeof text) <= 0) return UINT64_MAX;
    const char *from = name ? strstr(text, name) : text;
    if (!from) return UINT64_MAX;
    from += name ? strlen(name) : 0;
    return *from >= '0' && *from <= '9' ? strtoull(from, NULL, 10) : UINT64_MAX;
}

// What one control group leaves: its limit less what is used and is not a cache of files that can go.
TPR_COLD TPR_UNUSED static uint64_t tpr_os_group_left(const char *path, size_t length, bool second) {
    const char *folder = second ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    uint64_t limit =
        tpr_os_group_number(folder, path, length, second ? "memory.max" : "memory.limit_in_bytes", NULL);
    if (limit >= UINT64_C(1) << 60) return UINT64_MAX;
    uint64_t used =
        tpr_os_group_number(folder, path, length, second ? "memory.current" : "memory.usage_in_bytes", NULL);
    uint64_t cache = tpr_os_group_number(folder, path, length, "memory.stat",
                                         second ? "\ninactive_file " : "\ntotal_inactive_file ");
    if (used == UINT64_MAX) return UINT64_MAX;
    used -= cache < used ? cache : 0;
    return used < limit ? limit - used : 0;
}
#endif

// How many bytes of memory the control groups that this process is in leave it: to touch more would be a SIGKILL.
// UINT64_MAX: there is no limit, or it cannot be told.
TPR_COLD TPR_UNUSED static uint64_t tpr_os_memory_left(void) {
    uint64_t left = UINT64_MAX;
#ifndef TPRPC_NO_FILES
    char text[2048];
    if (tpr_os_read_file("/proc/self/cgroup", text, sizeof text) <= 0) return left;
    for (char *line = text, *end; line && *line; line = end) {
        if ((end = strchr(line, '\n')) != NULL) *end++ = 0;
        const bool second = strncmp(line, "0::/", 4) == 0;
        const char *path = second ? line + 3 : strstr(line, ":memory:/");
        if (!path) continue;
        path += second ? 0 : 8;
        for (size_t length = strlen(path);;) {   // the group, and those above it
            while (length > 0 && path[length - 1] == '/') length--;
            uint64_t here = tpr_os_group_left(path, length, second);
            if (here < left) left = here;
            if (!length) break;
            while (length > 0 && path[length - 1] != '/') length--;
        }
    }
#endif
    return left;
}

// What tells this boot of this machine from every other: 36 bytes of text at most.
TPR_UNUSED static void tpr_os_boot_id(char *out, size_t size) {
    struct utsname name;
    out[0] = 0;
#ifndef TPRPC_NO_FILES
    if (tpr_os_read_file("/proc/sys/kernel/random/boot_id", out, size) > 0) {
        out[strcspn(out, "\n")] = 0;
        return;
    }
#endif
    if (!TPR_OS_HOOKED("uname", TPR_OS_NO_SIZE) && uname(&name) == 0) snprintf(out, size, "%.36s", name.nodename);
}

// A number for what process ids are counted in: this boot of this machine and its namespace of processes. 0 where that
// cannot be told.
TPR_UNUSED static uint64_t tpr_os_process_space(void) {
#ifndef TPRPC_NO_FILES
    struct stat space;
    char boot[40];
    tpr_os_boot_id(boot, sizeof boot);
    if (boot[0] && !TPR_OS_HOOKED("stat", TPR_OS_NO_SIZE) && stat("/proc/self/ns/pid", &space) == 0) {
        uint64_t number = (uint64_t)space.st_ino;
        for (const char *c = boot; *c; c++) number = (number ^ (uint8_t)*c) * UINT64_C(0x100000001b3);
        return number;
    }
#endif
    return 0;
}

// A number that tells the network namespace `fd`'s socket is in from others of this boot; 0 where it cannot be told.
TPR_UNUSED static uint64_t tpr_os_net_namespace(void) {
    uint64_t cookie = 0;
    socklen_t size = sizeof cookie;
    if (TPR_OS_HOOKED("socket_unix", TPR_OS_NO_SIZE)) return 0;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return 0;
#ifdef SO_NETNS_COOKIE
    if (TPR_OS_HOOKED("netns_cookie", TPR_OS_NO_SIZE) ||
        getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &size) != 0) cookie = 0;
#else
    (void)size;
#endif
    close(fd);
    return cookie;
}

// ---- shared memory

enum { TPR_OS_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL };

// A memory descriptor of `size` bytes that no one can resize any more.
TPR_UNUSED static int tpr_os_memfd(const char *name, size_t size) {
    if (TPR_OS_HOOKED("memfd_create", TPR_OS_NO_SIZE)) return -1;
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return -1;
    if (TPR_OS_HOOKED("ftruncate", TPR_OS_NO_SIZE) || ftruncate(fd, (off_t)size) != 0 ||
        TPR_OS_HOOKED("fcntl", TPR_OS_NO_SIZE) || fcntl(fd, F_ADD_SEALS, TPR_OS_SEALS) != 0) {
        int code = errno;
        close(fd);
        errno = code;
        return -1;
    }
    return fd;
}

// Whether `fd` is a memory descriptor of exactly `size` bytes with the seals; errno says EPERM when it is not. Huge
// pages are refused: under the seals its giver can still take one away, and where none is left to replace it a look
// is a SIGBUS.
TPR_UNUSED static int tpr_os_memfd_check(int fd, size_t size) {
    struct stat st;
    struct statfs fs;
    if (TPR_OS_HOOKED("fstat", TPR_OS_NO_SIZE) || fstat(fd, &st) != 0) return -1;
    if (TPR_OS_HOOKED("fstatfs", TPR_OS_NO_SIZE) || fstatfs(fd, &fs) != 0) return -1;
    int seals = TPR_OS_HOOKED("get_seals", TPR_OS_NO_SIZE) ? -1 : fcntl(fd, F_GET_SEALS);
    int64_t type = (int64_t)(uint32_t)fs.f_type;
    if (TPR_OS_HOOKED("fstatfs_type", &type)) return -1;
    if (seals >= 0 && (seals & TPR_OS_SEALS) == TPR_OS_SEALS && st.st_size == (off_t)size &&
        type != (int64_t)HUGETLBFS_MAGIC) return 0;
    errno = EPERM;
    return -1;
}

TPR_UNUSED static void *tpr_os_map(int fd, size_t size) {
    if (TPR_OS_HOOKED("mmap", TPR_OS_NO_SIZE)) return NULL;
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return p == MAP_FAILED ? NULL : p;
}

// Gives the whole pages within a piece of shared memory back to the system: they read as zeros until they are written.
TPR_COLD TPR_UNUSED static void tpr_os_give_back(void *p, size_t size) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), skip = (page - (uintptr_t)p % page) % page;
    if (size < skip + page || TPR_OS_HOOKED("madvise", TPR_OS_NO_SIZE)) return;
    (void)madvise((uint8_t *)p + skip, (size - skip) / page * page, MADV_REMOVE);
}

TPR_UNUSED static void tpr_os_unmap(void *p, size_t size) {
    if (!p) return;
    (void)TPR_OS_HOOKED("munmap", TPR_OS_NO_SIZE);
    munmap(p, size);
}

// ---- readiness

enum { TPR_OS_READABLE = 1, TPR_OS_WRITABLE = 2, TPR_OS_HANGUP = 4 };
typedef struct tpr_os_event { void *user; uint32_t events; } tpr_os_event;

TPR_UNUSED static int tpr_os_poller(void) {
    if (TPR_OS_HOOKED("epoll_create", TPR_OS_NO_SIZE)) return -1;
    return epoll_create1(EPOLL_CLOEXEC);
}

// Adds (`change` false) or changes a descriptor: events are TPR_OS_READABLE and TPR_OS_WRITABLE, level-triggered.
TPR_UNUSED static int tpr_os_poller_set(int poller, int fd, uint32_t events, void *user, bool change) {
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    event.events = ((events & TPR_OS_READABLE) ? (uint32_t)EPOLLIN | (uint32_t)EPOLLRDHUP : 0u) |
                   ((events & TPR_OS_WRITABLE) ? (uint32_t)EPOLLOUT : 0u);
    event.data.ptr = user;
    if (TPR_OS_HOOKED("epoll_ctl", TPR_OS_NO_SIZE)) return -1;
    return epoll_ctl(poller, change ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event);
}

TPR_UNUSED static void tpr_os_poller_remove(int poller, int fd) {
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    (void)TPR_OS_HOOKED("epoll_del", TPR_OS_NO_SIZE);
    epoll_ctl(poller, EPOLL_CTL_DEL, fd, &event);
}

// Waits at most timeout_us (negative: no limit, 0: only looks). Returns how many events; 0 too when a signal came.
TPR_UNUSED static int tpr_os_poller_wait(int poller, tpr_os_event *out, int count, int64_t timeout_us) {
    struct epoll_event events[32];
    struct timespec ts;
    int n = -1;
    if (TPR_OS_HOOKED(timeout_us ? "epoll_wait" : "epoll_peek", &timeout_us)) return errno == EINTR ? 0 : -1;
    if (count > 32) count = 32;
    ts.tv_sec = (time_t)(timeout_us / 1000000);
    ts.tv_nsec = (long)(timeout_us % 1000000 * 1000);
#ifdef SYS_epoll_pwait2
    if (timeout_us > 0 && !TPR_OS_HOOKED("epoll_pwait2", TPR_OS_NO_SIZE))
        n = (int)syscall(SYS_epoll_pwait2, poller, events, count, &ts, NULL, (size_t)0);
    if (timeout_us <= 0 || (n < 0 && errno == ENOSYS))
#endif
        n = epoll_wait(poller, events, count, timeout_us < 0 ? -1 : timeout_us > 2000000000 ? 2000000
                                              : (int)((timeout_us + 999) / 1000));
    if (n < 0) return errno == EINTR ? 0 : -1;
    for (int i = 0; i < n; i++) {
        uint32_t e = events[i].events;
        out[i].user = events[i].data.ptr;
        out[i].events = ((e & EPOLLIN) ? (uint32_t)TPR_OS_READABLE : 0u) |
                        ((e & EPOLLOUT) ? (uint32_t)TPR_OS_WRITABLE : 0u) |
                        ((e & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) ? (uint32_t)TPR_OS_HANGUP : 0u);
    }
    return n;
}

TPR_UNUSED static int tpr_os_bell(void) {
    if (TPR_OS_HOOKED("eventfd", TPR_OS_NO_SIZE)) return -1;
    return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

TPR_COLD TPR_UNUSED static void tpr_os_bell_ring(int fd) {
    uint64_t one = 1;
    for (int i = 0; i < TPR_OS_RETRIES; i++)   // who sleeps must not miss it; full means that it rings already
        if (!TPR_OS_HOOKED("bell_write", TPR_OS_NO_SIZE) && (write(fd, &one, sizeof one) > 0 || errno == EAGAIN))
            return;
}

TPR_UNUSED static void tpr_os_bell_clear(int fd) {
    uint64_t count;
    if (TPR_OS_HOOKED("bell_read", TPR_OS_NO_SIZE)) return;
    ssize_t n = read(fd, &count, sizeof count);
    (void)n;
}

// A descriptor that turns readable when the process dies, whoever else holds its sockets. The caller makes sure that
// the pid still means that process.
TPR_UNUSED static int tpr_os_pidfd(int32_t pid) {
    if (TPR_OS_HOOKED("pidfd_open", TPR_OS_NO_SIZE)) return -1;
    return (int)syscall(SYS_pidfd_open, pid, 0u);   // close-on-exec by definition
}

// ---- sockets

typedef struct tpr_os_address { struct sockaddr_storage at; socklen_t size; } tpr_os_address;

TPR_UNUSED static int tpr_os_socket(int family) {
    if (TPR_OS_HOOKED(family == AF_UNIX ? "socket_unix" : "socket", TPR_OS_NO_SIZE)) return -1;
    return socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

// Looks up a host (numeric or name; empty: any) and port. Blocks for a name. Returns NULL, or a sentence saying what is
// wrong.
TPR_UNUSED static const char *tpr_os_resolve(const char *host, uint16_t port, tpr_os_address *out) {
    struct addrinfo hints, *list = NULL;
    char service[8];
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV | AI_NUMERICHOST | (host[0] ? 0 : AI_PASSIVE);   // these need no look-up
    snprintf(service, sizeof service, "%u", (unsigned)port);
    if (TPR_OS_HOOKED("getaddrinfo_numeric", TPR_OS_NO_SIZE)) return strerror(errno);
    int code = getaddrinfo(host[0] ? host : NULL, service, &hints, &list);
    if (code == EAI_NONAME) {
        if (TPR_OS_HOOKED("getaddrinfo", TPR_OS_NO_SIZE)) return strerror(errno);
        hints.ai_flags &= ~AI_NUMERICHOST;
        code = getaddrinfo(host, service, &hints, &list);
    }
    if (code != 0 || !list) return code == EAI_SYSTEM ? strerror(errno) : gai_strerror(code);
    memset(out, 0, sizeof *out);
    memcpy(&out->at, list->ai_addr, list->ai_addrlen);
    out->size = list->ai_addrlen;
    freeaddrinfo(list);
    return NULL;
}

TPR_UNUSED static bool tpr_os_is_loopback(const tpr_os_address *address) {
    if (address->at.ss_family == AF_INET) {
        struct sockaddr_in in;
        memcpy(&in, &address->at, sizeof in);
        return (ntohl(in.sin_addr.s_addr) >> 24) == 127;
    }
    struct sockaddr_in6 in6;
    memcpy(&in6, &address->at, sizeof in6);
    if (IN6_IS_ADDR_V4MAPPED(&in6.sin6_addr)) return in6.sin6_addr.s6_addr[12] == 127;
    return IN6_IS_ADDR_LOOPBACK(&in6.sin6_addr) != 0;
}

// "127.0.0.1:80" or "[::1]:80"; `port` false leaves the port away, and the brackets.
TPR_UNUSED static void tpr_os_address_text(const tpr_os_address *address, bool port, char *out, size_t size) {
    char host[INET6_ADDRSTRLEN] = "";
    if (address->at.ss_family == AF_INET) {
        struct sockaddr_in in;
        memcpy(&in, &address->at, sizeof in);
        inet_ntop(AF_INET, &in.sin_addr, host, sizeof host);
        if (port) snprintf(out, size, "%s:%u", host, (unsigned)ntohs(in.sin_port));
    } else {
        struct sockaddr_in6 in6;
        memcpy(&in6, &address->at, sizeof in6);
        inet_ntop(AF_INET6, &in6.sin6_addr, host, sizeof host);
        if (port) snprintf(out, size, "[%s]:%u", host, (unsigned)ntohs(in6.sin6_port));
    }
    if (!port) snprintf(out, size, "%s", host);
}

TPR_UNUSED static int tpr_os_local_address(int fd, tpr_os_address *out) {
    memset(out, 0, sizeof *out);
    out->size = sizeof out->at;
    if (TPR_OS_HOOKED("getsockname", TPR_OS_NO_SIZE)) return -1;
    return getsockname(fd, (struct sockaddr *)&out->at, &out->size);
}

TPR_UNUSED static int tpr_os_peer_address(int fd, tpr_os_address *out) {
    memset(out, 0, sizeof *out);
    out->size = sizeof out->at;
    if (TPR_OS_HOOKED("getpeername", TPR_OS_NO_SIZE)) return -1;
    return getpeername(fd, (struct sockaddr *)&out->at, &out->size);
}

// The address of this host that packets to `to` leave from, with port 0.
TPR_UNUSED static int tpr_os_route(const tpr_os_address *to, tpr_os_address *from) {
    if (TPR_OS_HOOKED("socket", TPR_OS_NO_SIZE)) return -1;
    int fd = socket(to->at.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    int code = TPR_OS_HOOKED("connect_route", TPR_OS_NO_SIZE)
                   ? -1 : connect(fd, (const struct sockaddr *)&to->at, to->size);
    if (code == 0) code = tpr_os_local_address(fd, from);
    int saved = errno;
    close(fd);
    errno = saved;
    if (from->at.ss_family == AF_INET) ((struct sockaddr_in *)(void *)&from->at)->sin_port = 0;
    if (from->at.ss_family == AF_INET6) ((struct sockaddr_in6 *)(void *)&from->at)->sin6_port = 0;
    return code;
}

// The first address of a network interface, IPv4 before IPv6. -1 with ENODEV when there is none of that name.
TPR_UNUSED static int tpr_os_interface(const char *name, tpr_os_address *out) {
    struct ifaddrs *list = NULL;
    bool found = false;
    if (TPR_OS_HOOKED("getifaddrs", TPR_OS_NO_SIZE) || getifaddrs(&list) != 0) return -1;
    for (struct ifaddrs *i = list; i; i = i->ifa_next) {
        if (!i->ifa_addr || strcmp(i->ifa_name, name) != 0) continue;
        int family = i->ifa_addr->sa_family;
        if (family != AF_INET && (family != AF_INET6 || found)) continue;
        memset(out, 0, sizeof *out);
        out->size = family == AF_INET ? (socklen_t)sizeof(struct sockaddr_in) : (socklen_t)sizeof(struct sockaddr_in6);
        memcpy(&out->at, i->ifa_addr, out->size);
        found = true;
        if (family == AF_INET) break;
    }
    freeifaddrs(list);
    if (!found) errno = ENODEV;
    return found ? 0 : -1;
}

// Options that a connection can do without, as they make it no more than faster or sooner known to be dead.
TPR_UNUSED static void tpr_os_set_option(int fd, const char *name, int level, int option, int value) {
    if (!TPR_OS_HOOKED(name, TPR_OS_NO_SIZE)) setsockopt(fd, level, option, &value, sizeof value);
}

TPR_UNUSED static int tpr_os_listen(int fd, const tpr_os_address *address) {
    if (address->at.ss_family != AF_UNIX) tpr_os_set_option(fd, "reuseaddr", SOL_SOCKET, SO_REUSEADDR, 1);
    if (TPR_OS_HOOKED("bind", TPR_OS_NO_SIZE) || bind(fd, (const struct sockaddr *)&address->at, address->size) != 0)
        return -1;
    if (TPR_OS_HOOKED("listen", TPR_OS_NO_SIZE)) return -1;
    return listen(fd, 4096);   // the system's own limit cuts it
}

TPR_UNUSED static int tpr_os_accept(int fd) {
    if (TPR_OS_HOOKED("accept", TPR_OS_NO_SIZE)) return -1;
    return accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
}

// Begins to connect: 0 when done at once, -1 with EINPROGRESS when writability will tell.
TPR_UNUSED static int tpr_os_connect(int fd, const tpr_os_address *address) {
    if (TPR_OS_HOOKED("connect", TPR_OS_NO_SIZE)) return -1;
    int code = connect(fd, (const struct sockaddr *)&address->at, address->size);
    if (code != 0 && errno == EINTR) errno = EINPROGRESS;
    return code;
}

TPR_UNUSED static int tpr_os_socket_error(int fd) {
    int code = 0;
    socklen_t size = sizeof code;
    if (TPR_OS_HOOKED("socket_error", TPR_OS_NO_SIZE)) return errno;
    return getsockopt(fd, SOL_SOCKET, SO_ERROR, &code, &size) == 0 ? code : errno;
}

TPR_UNUSED static void tpr_os_tcp_options(int fd, int keepalive_s) {
    int interval = keepalive_s / 3 ? keepalive_s / 3 : 1;
    tpr_os_set_option(fd, "nodelay", IPPROTO_TCP, TCP_NODELAY, 1);
    tpr_os_set_option(fd, "keepalive", SOL_SOCKET, SO_KEEPALIVE, 1);
    tpr_os_set_option(fd, "keepidle", IPPROTO_TCP, TCP_KEEPIDLE, interval);
    tpr_os_set_option(fd, "keepintvl", IPPROTO_TCP, TCP_KEEPINTVL, interval);
    tpr_os_set_option(fd, "keepcnt", IPPROTO_TCP, TCP_KEEPCNT, 3);
}

TPR_UNUSED static size_t tpr_os_spans(const tprpc_span *spans, size_t count, struct iovec *out, int64_t limit) {
    size_t used = 0;
    for (size_t i = 0; i < count && used < TPR_OS_SPANS && limit > 0; i++) {
        if (!spans[i].size) continue;
        out[used].iov_base = spans[i].data;
        out[used].iov_len = (int64_t)spans[i].size < limit ? spans[i].size : (size_t)limit;
        limit -= (int64_t)out[used++].iov_len;
    }
    return used;
}

// Sends what the socket takes of the first 16 spans. Returns bytes, or -1 with EAGAIN or what is wrong.
TPR_UNUSED static int64_t tpr_os_send(int fd, const tprpc_span *spans, size_t count, const intptr_t *handles,
                                      size_t handle_count, bool more) {
    struct iovec iov[TPR_OS_SPANS];
    struct msghdr msg;
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int) * TPR_OS_HANDLES)]; } control;
    int64_t limit = INT64_MAX;
    memset(&msg, 0, sizeof msg);
    if (handle_count) {
        memset(&control, 0, sizeof control);
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(sizeof(int) * handle_count);
        control.align.cmsg_level = SOL_SOCKET;
        control.align.cmsg_type = SCM_RIGHTS;
        control.align.cmsg_len = CMSG_LEN(sizeof(int) * handle_count);
        for (size_t i = 0; i < handle_count; i++) {
            int handle = (int)handles[i];
            memcpy(CMSG_DATA(&control.align) + i * sizeof(int), &handle, sizeof handle);
        }
    }
    for (int i = 0; i < TPR_OS_RETRIES; i++) {
        if (TPR_OS_HOOKED("send", &limit)) {
            if (errno == EINTR) continue;
            return -1;
        }
        msg.msg_iov = iov;
        msg.msg_iovlen = tpr_os_spans(spans, count, iov, limit);
        ssize_t n;
        if (msg.msg_iovlen == 1 && !handle_count)   // less for the kernel to do
            n = send(fd, iov[0].iov_base, iov[0].iov_len, MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0));
        else
            n = sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0));
        if (n >= 0 || errno != EINTR) return (int64_t)n;
    }
    errno = EAGAIN;
    return -1;
}

// Receives into the first 16 spans. Returns bytes, 0 at the end of the stream, or -1 with EAGAIN or what is wrong. When
// `handles` is given, *handle_count is its capacity and becomes how many came.
TPR_UNUSED static int64_t tpr_os_recv(int fd, const tprpc_span *spans, size_t count, intptr_t *handles,
                                      size_t *handle_count) {
    struct iovec iov[TPR_OS_SPANS];
    struct msghdr msg;
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int) * TPR_OS_HANDLES)]; } control;
    int64_t limit = INT64_MAX;
    ssize_t n = -1;
    int tries = 0;
    size_t capacity = handles ? *handle_count : 0;
    if (handles) *handle_count = 0;
    for (;; tries++) {
        if (tries == TPR_OS_RETRIES) errno = EAGAIN;
        if (tries == TPR_OS_RETRIES) return -1;
        if (TPR_OS_HOOKED("recv", &limit)) {
            if (errno == EINTR) continue;
            return -1;
        }
        size_t used = tpr_os_spans(spans, count, iov, limit);
        if (!handles) {
            n = used == 1 ? recv(fd, iov[0].iov_base, iov[0].iov_len, MSG_DONTWAIT) : readv(fd, iov, (int)used);
        } else {
            memset(&msg, 0, sizeof msg);
            msg.msg_iov = iov;
            msg.msg_iovlen = used;
            msg.msg_control = &control;
            msg.msg_controllen = sizeof control;
            n = recvmsg(fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        }
        if (n >= 0 || errno != EINTR) break;
    }
    if (n < 0 || !handles) return (int64_t)n;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        size_t bytes = c->cmsg_len - CMSG_LEN(0);
        for (size_t i = 0; i < bytes / sizeof(int); i++) {
            int fd_in;
            memcpy(&fd_in, CMSG_DATA(c) + i * sizeof(int), sizeof fd_in);
            if (*handle_count < capacity) handles[(*handle_count)++] = fd_in;
            else close(fd_in);
        }
    }
    return (int64_t)n;
}

// An address in the abstract namespace: it needs no file and goes with the last socket.
TPR_UNUSED static int tpr_os_unix_address(const char *name, tpr_os_address *out) {
    struct sockaddr_un un;
    size_t length = strlen(name);
    if (length == 0 || length > sizeof un.sun_path - 2) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memset(&un, 0, sizeof un);
    memset(out, 0, sizeof *out);
    un.sun_family = AF_UNIX;
    memcpy(un.sun_path + 1, name, length);
    memcpy(&out->at, &un, sizeof un);
    out->size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
    return 0;
}

TPR_UNUSED static int tpr_os_credentials(int fd, int32_t *pid, uint32_t *user) {
    struct ucred credentials;
    socklen_t size = sizeof credentials;
    memset(&credentials, 0, sizeof credentials);
    if (TPR_OS_HOOKED("getsockopt", TPR_OS_NO_SIZE)) return -1;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return -1;
    *pid = (int32_t)credentials.pid;
    *user = (uint32_t)credentials.uid;
    return 0;
}

// ---- the memory of other processes

// Reads the first 16 pieces of another process's memory, those of `from`, into `to`, each of the same size and none
// empty. Returns bytes, which are fewer where a piece cannot be read, or -1 (EPERM, ESRCH, EFAULT).
TPR_UNUSED static int64_t tpr_os_read_process(int32_t pid, const tprpc_span *to, const tprpc_span *from, size_t count) {
    struct iovec here[TPR_OS_SPANS], there[TPR_OS_SPANS];
    int64_t limit = INT64_MAX;
    if (TPR_OS_HOOKED("process_vm_readv", &limit)) return -1;
    const size_t used = tpr_os_spans(to, count, here, limit);
    for (size_t i = 0; i < used; i++) {
        there[i].iov_base = from[i].data;
        there[i].iov_len = here[i].iov_len;
    }
    return process_vm_readv(pid, here, used, there, used, 0);
}

// Lets every process of this user read this one's memory where the system keeps that to debuggers (Yama).
TPR_UNUSED static void tpr_os_let_read(void) {
    if (!TPR_OS_HOOKED("prctl", TPR_OS_NO_SIZE)) prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
}

// ---- large copies

// Not under gcc's sanitizers, which do not see these stores. Clang's do.
#if defined(__SSE2__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#include <emmintrin.h>
enum { TPR_OS_LINE = 64, TPR_OS_LANE = 4096, TPR_OS_LANES = 4 };

static inline void tpr_os_copy_line(uint8_t *to, const uint8_t *from) {
    __m128i *out = (__m128i *)(void *)to;
    const __m128i *in = (const __m128i *)(const void *)from;
    const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1), c = _mm_loadu_si128(in + 2),
                  d = _mm_loadu_si128(in + 3);
    tpr_atomic_prefetch(from + 4 * TPR_OS_LINE);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
}

// Copies a piece of what is larger than the caches: by stores that do not fetch what they overwrite, to four pages by
// turns, so that the memory's banks work side by side. 64 MiB at 9.8 GB/s, by memcpy at 5.5; but what is read at once
// and would still be in the cache is the slower for it, up to 16 MiB (2-core x86-64 VM, Xeon with 2 MiB a core).
TPR_UNUSED static void tpr_os_copy_large(void *to, const void *from, size_t size) {
    uint8_t *out = (uint8_t *)to;
    const uint8_t *in = (const uint8_t *)from;
    size_t head = (TPR_OS_LINE - (uintptr_t)out % TPR_OS_LINE) % TPR_OS_LINE;
    if (head > size) head = size;
    memcpy(out, in, head);
    for (out += head, in += head, size -= head; size >= (size_t)TPR_OS_LANE * TPR_OS_LANES;) {
        for (size_t at = 0; at < TPR_OS_LANE; at += TPR_OS_LINE)
            for (size_t lane = 0; lane < TPR_OS_LANES; lane++)
                tpr_os_copy_line(out + lane * TPR_OS_LANE + at, in + lane * TPR_OS_LANE + at);
        out += (size_t)TPR_OS_LANE * TPR_OS_LANES;
        in += (size_t)TPR_OS_LANE * TPR_OS_LANES;
        size -= (size_t)TPR_OS_LANE * TPR_OS_LANES;
    }
    memcpy(out, in, size);
    _mm_sfence();                      // such stores are not in order: before anyone is told that the bytes are there
}
#else
TPR_UNUSED static void tpr_os_copy_large(void *to, const void *from, size_t size) { memcpy(to, from, size); }
#endif

// ---- TCP: who owns the other end, and how a connection ends

#include <linux/sockios.h>
#include <sys/ioctl.h>

// How many bytes were sent and not acknowledged, those included that still wait for a window. -1: it cannot be told.
TPR_UNUSED static int tpr_os_tcp_queued(int fd) {
    int queued = 0;
    if (TPR_OS_HOOKED("ioctl", TPR_OS_NO_SIZE) || ioctl(fd, SIOCOUTQ, &queued) != 0) return -1;
    return queued;
}

// For how long a peer has acknowledged nothing although a segment or a window probe was sent to it since, in ms; -1
// when none was, or it cannot be told. A live peer that does not read answers each, but in the end is asked only every
// 120 s: how long ago the last ACK came does not tell it from a dead one.
TPR_UNUSED static int64_t tpr_os_tcp_silent_ms(int fd) {
    struct tcp_info info;
    socklen_t size = sizeof info;
    memset(&info, 0, sizeof info);
    if (TPR_OS_HOOKED("tcp_info", TPR_OS_NO_SIZE) || getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0)
        return -1;
    bool asked = info.tcpi_probes > 0 || (info.tcpi_unacked > 0 && info.tcpi_last_ack_recv > info.tcpi_last_data_sent);
    return asked ? (int64_t)info.tcpi_last_ack_recv : -1;
}

// Closes a connection so that what was sent still arrives: received bytes that nobody read would turn the close into a
// reset, so what is there (at most 16 MiB) is thrown away first. The shutdown ends it even if a forked child holds it.
TPR_UNUSED static void tpr_os_tcp_close(int fd) {
    (void)TPR_OS_HOOKED("shutdown", TPR_OS_NO_SIZE);
    shutdown(fd, SHUT_WR);
    for (int i = 0; i < 16; i++)
        if (TPR_OS_HOOKED("drain", TPR_OS_NO_SIZE) || recv(fd, NULL, 1 << 20, MSG_TRUNC | MSG_DONTWAIT) <= 0) break;
    tpr_os_close(fd);
}

// The port in network order; the address, 4 or 16 bytes, into out.
TPR_UNUSED static uint16_t tpr_os_tcp_end(const tpr_os_address *address, uint32_t out[4]) {
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    memset(out, 0, 4 * sizeof *out);
    if (address->at.ss_family == AF_INET) {
        memcpy(&in, &address->at, sizeof in);
        out[0] = in.sin_addr.s_addr;
        return in.sin_port;
    }
    memcpy(&in6, &address->at, sizeof in6);
    memcpy(out, &in6.sin6_addr, sizeof in6.sin6_addr);
    return in6.sin6_port;
}

// Asks the kernel for the one socket whose own end is `own` and whose other end is `other`. A socket that has no inode
// was closed or not accepted yet; what the kernel then gives as its user is 0 and means nothing.
TPR_UNUSED static int tpr_os_tcp_owner_diag(const tpr_os_address *own, const tpr_os_address *other, uint32_t *user) {
    struct { struct nlmsghdr head; struct inet_diag_req_v2 ask; } request;
    struct { struct nlmsghdr head; struct inet_diag_msg found; uint32_t attributes[256]; } reply;
    struct nlmsgerr failed;
    if (TPR_OS_HOOKED("sock_diag", TPR_OS_NO_SIZE)) return -1;   // the socket
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    if (fd < 0) return -1;
    memset(&request, 0, sizeof request);
    memset(&reply, 0, sizeof reply);
    request.head.nlmsg_len = sizeof request;
    request.head.nlmsg_type = SOCK_DIAG_BY_FAMILY;
    request.head.nlmsg_flags = NLM_F_REQUEST;
    request.ask.sdiag_family = (uint8_t)own->at.ss_family;
    request.ask.sdiag_protocol = IPPROTO_TCP;
    request.ask.idiag_states = ~0u;
    request.ask.id.idiag_sport = tpr_os_tcp_end(own, request.ask.id.idiag_src);
    request.ask.id.idiag_dport = tpr_os_tcp_end(other, request.ask.id.idiag_dst);
    request.ask.id.idiag_cookie[0] = request.ask.id.idiag_cookie[1] = INET_DIAG_NOCOOKIE;
    ssize_t n = TPR_OS_HOOKED("sock_diag_send", TPR_OS_NO_SIZE) ? -1 : send(fd, &request, sizeof request, 0);
    if (n >= 0 && TPR_OS_HOOKED("sock_diag_recv", TPR_OS_NO_SIZE)) n = -1;
    if (n >= 0) n = recv(fd, &reply, sizeof reply, MSG_DONTWAIT);   // the kernel has answered within the send
    int code = n < 0 ? errno : EPROTO;
    close(fd);
    if (n >= (ssize_t)NLMSG_LENGTH(sizeof failed) && reply.head.nlmsg_type == NLMSG_ERROR) {
        memcpy(&failed, &reply.found, sizeof failed);
        code = -failed.error;
    } else if (n >= (ssize_t)NLMSG_LENGTH(sizeof reply.found) && reply.head.nlmsg_type == SOCK_DIAG_BY_FAMILY) {
        *user = reply.found.idiag_uid;
        bool same = reply.found.id.idiag_sport == request.ask.id.idiag_sport &&   // else it is a listener
                    reply.found.id.idiag_dport == request.ask.id.idiag_dport;
        code = same && reply.found.idiag_inode ? 0 : ENOENT;
    }
    errno = code;
    return code ? -1 : 0;
}

#ifndef TPRPC_NO_FILES
// Looks for a line that has `ends` in a table like /proc/net/tcp. -1 with ENOENT: there is none whose user is known.
TPR_UNUSED static int tpr_os_tcp_owner_scan(const char *path, const char *ends, uint32_t *user) {
    char text[4096], *line, *next;
    size_t have = 0;
    ssize_t n = 0;
    bool found = false;
    if (TPR_OS_HOOKED("open", TPR_OS_NO_SIZE)) return -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    while (!found && have < sizeof text - 1) {
        n = TPR_OS_HOOKED("read_owner", TPR_OS_NO_SIZE) ? -1 : read(fd, text + have, sizeof text - 1 - have);
        if (n <= 0) break;
        have += (size_t)n;
        text[have] = 0;
        for (line = text; !found && (next = strchr(line, '\n')) != NULL; line = next + 1) {
            unsigned uid = 0;
            unsigned long inode = 0;
            *next = 0;
            const char *at = strstr(line, ends);
            found = at && sscanf(at + strlen(ends), " %*x %*x:%*x %*x:%*x %*x %u %*d %lu", &uid, &inode) == 2 && inode;
            *user = uid;
        }
        have = strlen(line);
        memmove(text, line, have);
    }
    int code = n < 0 ? errno : ENOENT;
    close(fd);
    if (!found) errno = code;
    return found ? 0 : -1;
}

TPR_UNUSED static int tpr_os_tcp_owner_proc(const tpr_os_address *own, const tpr_os_address *other, uint32_t *user) {
    uint32_t a[4], b[4];
    char ends[80];
    unsigned port_a = ntohs(tpr_os_tcp_end(own, a)), port_b = ntohs(tpr_os_tcp_end(other, b));
    bool v4 = own->at.ss_family == AF_INET, mapped = !v4 && a[0] == 0 && a[1] == 0 && a[2] == htonl(0xffff);
    if (v4 || mapped) {   // a mapped address may be either family's on the other side
        snprintf(ends, sizeof ends, " %08X:%04X %08X:%04X", a[v4 ? 0 : 3], port_a, b[v4 ? 0 : 3], port_b);
        if (tpr_os_tcp_owner_scan("/proc/net/tcp", ends, user) == 0) return 0;
    }
    if (v4) {
        a[2] = b[2] = htonl(0xffff);
        a[3] = a[0];
        b[3] = b[0];
        a[0] = b[0] = 0;
    }
    snprintf(ends, sizeof ends, " %08X%08X%08X%08X:%04X %08X%08X%08X%08X:%04X", a[0], a[1], a[2], a[3], port_a,
             b[0], b[1], b[2], b[3], port_b);
    return tpr_os_tcp_owner_scan("/proc/net/tcp6", ends, user);
}
#endif

// The user whose socket on this host has the ends `own` and, at its other side, `other`. -1 with ENOENT: there is no
// such socket (any more); with another code: it cannot be told here.
TPR_UNUSED static int tpr_os_tcp_owner(const tpr_os_address *own, const tpr_os_address *other, uint32_t *user) {
    if (tpr_os_tcp_owner_diag(own, other, user) == 0) return 0;
#ifndef TPRPC_NO_FILES
    if (errno != ENOENT) return tpr_os_tcp_owner_proc(own, other, user);
#endif
    return -1;
}

// ---- for shared memory

#include <poll.h>

// Whether a read from `fd` would not wait.
TPR_UNUSED static bool tpr_os_readable(int fd) {
    struct pollfd look;
    look.fd = fd;
    look.events = POLLIN;
    look.revents = 0;
    return !TPR_OS_HOOKED("poll", TPR_OS_NO_SIZE) && poll(&look, 1, 0) > 0;
}

// Ends a socket for all who hold it, a forked child included.
TPR_UNUSED static void tpr_os_shutdown(int fd) {
    (void)TPR_OS_HOOKED("shutdown", TPR_OS_NO_SIZE);
    shutdown(fd, SHUT_RDWR);
}

// ---- files that processes share

#ifndef TPRPC_NO_FILES
// Opens a regular file of this user's for reading and writing, creating it. EINVAL: something else than a regular file;
// EPERM: another user's.
TPR_UNUSED static int tpr_os_file_open(const char *path) {
    struct stat st;
    if (TPR_OS_HOOKED("open_file", TPR_OS_NO_SIZE)) return -1;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0600);   // a FIFO's open would block
    if (fd < 0) return -1;
    int code = TPR_OS_HOOKED("fstat", TPR_OS_NO_SIZE) || fstat(fd, &st) != 0 ? errno
               : !S_ISREG(st.st_mode) ? EINVAL : st.st_uid != geteuid() ? EPERM : 0;
    if (!code) return fd;
    close(fd);
    errno = code;
    return -1;
}

// Takes (or gives back) the whole file for this descriptor, never waiting: -1 with EAGAIN while another one has it. The
// lock belongs to the open file, not to the process, so two stores of one process exclude each other too.
TPR_UNUSED static int tpr_os_file_lock(int fd, bool take) {
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = (short)(take ? F_WRLCK : F_UNLCK);
    lock.l_whence = SEEK_SET;
    if (TPR_OS_HOOKED("fcntl", TPR_OS_NO_SIZE)) return -1;
    int code = fcntl(fd, F_OFD_SETLK, &lock);
    if (code != 0 && errno == EACCES) errno = EAGAIN;
    return code;
}

TPR_UNUSED static int64_t tpr_os_file_size(int fd) {
    struct stat st;
    if (TPR_OS_HOOKED("fstat", TPR_OS_NO_SIZE) || fstat(fd, &st) != 0) return -1;
    return (int64_t)st.st_size;
}

// Reads until `size` bytes or the end of the file. Returns how many.
TPR_UNUSED static int64_t tpr_os_file_read(int fd, void *out, size_t size, int64_t offset) {
    size_t done = 0;
    for (int i = 0; done < size && i < TPR_OS_RETRIES; i++) {
        int64_t part = (int64_t)(size - done);
        if (TPR_OS_HOOKED("pread", &part)) {
            if (errno == EINTR) continue;
            return -1;
        }
        ssize_t n = pread(fd, (char *)out + done, (size_t)part, (off_t)(offset + (int64_t)done));
        if (n < 0 && errno != EINTR) return -1;
        if (n == 0) break;
        if (n > 0) done += (size_t)n;
    }
    return (int64_t)done;
}

// Writes all of it, or fails, with some of it written or none.
TPR_UNUSED static int tpr_os_file_write(int fd, const void *bytes, size_t size, int64_t offset) {
    size_t done = 0;
    for (int i = 0; done < size && i < TPR_OS_RETRIES; i++) {
        int64_t part = (int64_t)(size - done);
        if (TPR_OS_HOOKED("pwrite", &part)) {
            if (errno == EINTR) continue;
            return -1;
        }
        ssize_t n = pwrite(fd, (const char *)bytes + done, (size_t)part, (off_t)(offset + (int64_t)done));
        if (n < 0 && errno != EINTR) return -1;
        if (n > 0) done += (size_t)n;
    }
    if (done < size) errno = EIO;
    return done < size ? -1 : 0;
}

TPR_UNUSED static int tpr_os_file_truncate(int fd, int64_t size) {
    if (TPR_OS_HOOKED("ftruncate", TPR_OS_NO_SIZE)) return -1;
    return ftruncate(fd, (off_t)size);
}
#endif

// >>base --------------------------------------------------------------------------------------------------------------
// What every section stands on: errors, memory, log, lists, maps, slabs, byte order, names.
//
// Uses: atomic, os.
// Invariant: every byte of memory comes from tpr_base_alloc with a tag and goes back by tpr_base_free with the same
// tag and size; nothing here takes a lock for longer than a few instructions.

// ---- errors

// What an errno means as a status, where nothing more is known.
static tprpc_status tpr_base_status_of(int code) {
    switch (code) {
    case ENOMEM: return TPRPC_ERROR_MEMORY;
    case EMFILE: case ENFILE: case ENOBUFS: case ENOSPC: case EAGAIN: return TPRPC_ERROR_LIMIT;
    case EACCES: case EPERM: return TPRPC_ERROR_DENIED;
    case ECONNREFUSED: case ENETUNREACH: case EHOSTUNREACH: case EADDRNOTAVAIL: case EADDRINUSE: case ENOENT:
        return TPRPC_ERROR_UNREACHABLE;
    case ECONNRESET: case EPIPE: case ECONNABORTED: return TPRPC_ERROR_PEER;
    case ETIMEDOUT: return TPRPC_ERROR_TIMEOUT;
    case EAFNOSUPPORT: case ENOSYS: case EPROTONOSUPPORT: return TPRPC_ERROR_UNSUPPORTED;
    default: return TPRPC_ERROR_SYSTEM;
    }
}

// Fills `error` for a system call that failed with errno.
TPR_COLD static tprpc_status tpr_base_os_error(tprpc_error *error, int code, const char *what, const char *of) {
    return tprpc_error_set(error, tpr_base_status_of(code), code, "%s %s: %s", what, of, strerror(code));
}

// ---- memory

typedef struct tpr_base_memory {
    tprpc_allocator hooks;           // alloc and free are set
    uint64_t limit, used;            // bytes; used is atomic
} tpr_base_memory;

static void *tpr_base_default_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    void *p = NULL;
    (void)tag;
    (void)user;
    return posix_memalign(&p, align < sizeof(void *) ? sizeof(void *) : align, size) == 0 ? p : NULL;
}

static void tpr_base_default_free(void *ptr, size_t size, uint32_t tag, void *user) {
    (void)size;
    (void)tag;
    (void)user;
    free(ptr);
}

TPR_COLD static void *tpr_base_alloc(tpr_base_memory *memory, size_t size, size_t align, uint32_t tag) {
    uint64_t before = TPR_ATOMIC_ADD(&memory->used, (uint64_t)size);
    if (before + size <= memory->limit && before + size >= before && !TPR_OS_HOOKED("alloc", TPR_OS_NO_SIZE)) {
        void *p = memory->hooks.alloc(size ? size : 1, align, tag, memory->hooks.user);
        if (p) return p;
    }
    TPR_ATOMIC_SUB(&memory->used, (uint64_t)size);
    return NULL;
}

// Counts memory that comes from elsewhere. False: it would be more than the limit.
TPR_COLD TPR_UNUSED static bool tpr_base_charge(tpr_base_memory *memory, size_t size) {
    uint64_t before = TPR_ATOMIC_ADD(&memory->used, (uint64_t)size);
    if (before + size <= memory->limit && before + size >= before) return true;
    TPR_ATOMIC_SUB(&memory->used, (uint64_t)size);
    return false;
}

TPR_COLD TPR_UNUSED static void tpr_base_discharge(tpr_base_memory *memory, size_t size) {
    TPR_ATOMIC_SUB(&memory->used, (uint64_t)size);
}

TPR_COLD static void tpr_base_free(tpr_base_memory *memory, void *ptr, size_t size, uint32_t tag) {
    if (!ptr) return;
    memory->hooks.free(ptr, size ? size : 1, tag, memory->hooks.user);
    TPR_ATOMIC_SUB(&memory->used, (uint64_t)size);
}

// Zeroed memory for a struct.
TPR_COLD static void *tpr_base_new(tpr_base_memory *memory, size_t size, uint32_t tag) {
    void *p = tpr_base_alloc(memory, size, 64, tag);
    if (p) memset(p, 0, size);
    return p;
}

// A cache of blocks by power of two from 64 B to 128 KiB, so that a hot path allocates nothing once it is warm. Not
// locked: each belongs to a loop. Larger blocks go straight to the allocator.
enum { TPR_BASE_POOL_CLASSES = 12, TPR_BASE_POOL_LEAST = 64, TPR_BASE_POOL_KEEP = 1 << 20 };   // bytes kept per class
typedef struct tpr_base_block { struct tpr_base_block *next; } tpr_base_block;
typedef struct tpr_base_pool {
    tpr_base_memory *memory;
    tpr_base_block  *free[TPR_BASE_POOL_CLASSES];
    uint32_t         kept[TPR_BASE_POOL_CLASSES];
} tpr_base_pool;

static inline uint32_t tpr_base_pool_class(size_t size) {
    if (size <= TPR_BASE_POOL_LEAST) return 0;
    if (size > (size_t)TPR_BASE_POOL_LEAST << (TPR_BASE_POOL_CLASSES - 1)) return TPR_BASE_POOL_CLASSES;
    return (uint32_t)(64 - __builtin_clzll((unsigned long long)(size - 1))) - 6;
}

static inline void *tpr_base_pool_take(tpr_base_pool *pool, size_t size) {
    uint32_t c = tpr_base_pool_class(size);
    if (TPR_UNLIKELY(c == TPR_BASE_POOL_CLASSES))
        return tpr_base_alloc(pool->memory, size, 64, TPR_TAG('b', 'u', 'l', 'k'));
    tpr_base_block *block = pool->free[c];
    if (TPR_UNLIKELY(!block))
        return tpr_base_alloc(pool->memory, (size_t)TPR_BASE_POOL_LEAST << c, 64, TPR_TAG('p', 'o', 'o', 'l'));
    pool->free[c] = block->next;
    pool->kept[c]--;
    return block;
}

static inline void tpr_base_pool_give(tpr_base_pool *pool, void *ptr, size_t size) {
    uint32_t c = tpr_base_pool_class(size);
    if (!ptr) return;
    if (TPR_UNLIKELY(c == TPR_BASE_POOL_CLASSES)) {
        tpr_base_free(pool->memory, ptr, size, TPR_TAG('b', 'u', 'l', 'k'));
        return;
    }
    size_t whole = (size_t)TPR_BASE_POOL_LEAST << c;
    if (TPR_UNLIKELY((pool->kept[c] + 1) * whole > TPR_BASE_POOL_KEEP && pool->kept[c] >= 16)) {
        tpr_base_free(pool->memory, ptr, whole, TPR_TAG('p', 'o', 'o', 'l'));
        return;
    }
    tpr_base_block *block = (tpr_base_block *)ptr;
    block->next = pool->free[c];
    pool->free[c] = block;
    pool->kept[c]++;
}

// The same without their code in the caller: for all but what every message needs.
TPR_APART static void *tpr_base_pool_alloc(tpr_base_pool *pool, size_t size) { return tpr_base_pool_take(pool, size); }
TPR_APART static void tpr_base_pool_free(tpr_base_pool *pool, void *ptr, size_t size) {
    tpr_base_pool_give(pool, ptr, size);
}

static void tpr_base_pool_clear(tpr_base_pool *pool) {
    for (uint32_t c = 0; c < TPR_BASE_POOL_CLASSES; c++) {
        while (pool->free[c]) {
            tpr_base_block *block = pool->free[c];
            pool->free[c] = block->next;
            tpr_base_free(pool->memory, block, (size_t)TPR_BASE_POOL_LEAST << c, TPR_TAG('p', 'o', 'o', 'l'));
        }
        pool->kept[c] = 0;
    }
}

// ---- log: lines are put down under any lock and handed to the user later, without one

enum { TPR_BASE_LOG_LINES = 64, TPR_BASE_LOG_TEXT = 200 };
typedef struct tpr_base_log_line {
    int32_t level, line; uint32_t id; const char *file; char section[16], peer[48], text[TPR_BASE_LOG_TEXT];
} tpr_base_log_line;
typedef struct tpr_base_logger {
    void (*log)(const tprpc_log *entry, void *user);   // NULL: silent
    void *user;
    tpr_os_lock lock;
    uint32_t head, tail, dropped;      // lines put, lines handed on (head is atomic, for a look without the lock)
    tpr_base_log_line *lines;          // TPR_BASE_LOG_LINES of them, when there is a log
} tpr_base_logger;

static uint64_t tpr_base_hash(const void *bytes, size_t size) {   // FNV-1a, 64 bits
    const uint8_t *p = (const uint8_t *)bytes;
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < size; i++) hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);
    return hash;
}

__attribute__((format(printf, 7, 8))) TPR_UNUSED
TPR_COLD static void tpr_base_log_put(tpr_base_logger *logger, int32_t level, const char *section, const char *peer,
                             const char *file, int32_t line, const char *format, ...) {
    va_list args;
    if (!logger->log) return;
    tpr_os_lock_take(&logger->lock);
    if (logger->head - logger->tail < TPR_BASE_LOG_LINES) {
        tpr_base_log_line *entry = &logger->lines[logger->head % TPR_BASE_LOG_LINES];
        entry->level = level;
        entry->line = line;
        entry->id = (uint32_t)tpr_base_hash(format, strlen(format));
        snprintf(entry->section, sizeof entry->section, "%s", section);   // names of backends have at most 15 bytes
        entry->file = file;
        snprintf(entry->peer, sizeof entry->peer, "%s", peer ? peer : "");
        va_start(args, format);
        vsnprintf(entry->text, sizeof entry->text, format, args);
        va_end(args);
        TPR_ATOMIC_STORE(&logger->head, logger->head + 1);
    } else {
        logger->dropped++;
    }
    tpr_os_lock_give(&logger->lock);
}

#define TPR_LOG(logger, level, section, peer, ...) \
    do { if ((level) <= TPRPC_LOG_LEVEL) tpr_base_log_put((logger), (level), (section), (peer), __FILE__, __LINE__, \
                                                          __VA_ARGS__); } while (0)

// The line that stands for those that found no room.
static void tpr_base_log_lost(tpr_base_log_line *line, uint32_t count) {
    static const char format[] = "%u lines were dropped: more than %d came before the log was written";
    memset(line, 0, sizeof *line);
    line->level = TPRPC_LOG_WARNING;
    line->line = __LINE__;
    line->id = (uint32_t)tpr_base_hash(format, strlen(format));
    line->file = __FILE__;
    memcpy(line->section, "log", sizeof "log");
    snprintf(line->text, sizeof line->text, format, (unsigned)count, (int)TPR_BASE_LOG_LINES);
}

// Hands lines to the user's log. No lock of ours may be held.
TPR_COLD static void tpr_base_log_flush(tpr_base_logger *logger) {
    if (TPR_LIKELY(TPR_ATOMIC_LOAD(&logger->head) == TPR_ATOMIC_PEEK(&logger->tail)) || !logger->log) return;
    for (;;) {
        tpr_base_log_line line;
        tprpc_log entry;
        tpr_os_lock_take(&logger->lock);
        bool any = logger->head != logger->tail;
        uint32_t dropped = any ? 0 : logger->dropped;
        if (any) {
            line = logger->lines[logger->tail % TPR_BASE_LOG_LINES];
            TPR_ATOMIC_POKE(&logger->tail, logger->tail + 1);
        } else {
            logger->dropped = 0;
        }
        tpr_os_lock_give(&logger->lock);
        if (!any && (!dropped || TPRPC_LOG_LEVEL < TPRPC_LOG_WARNING)) return;
        if (!any) tpr_base_log_lost(&line, dropped);
        entry.level = line.level;
        entry.id = line.id;
        entry.section = line.section;
        entry.peer = line.peer;
        entry.text = line.text;
        entry.file = line.file;
        entry.line = line.line;
        logger->log(&entry, logger->user);
    }
}

// ---- lists: doubly linked, through a member, around a head

typedef struct tpr_base_list { struct tpr_base_list *next, *prev; } tpr_base_list;

static inline void tpr_base_list_init(tpr_base_list *head) { head->next = head->prev = head; }
static inline bool tpr_base_list_empty(const tpr_base_list *head) { return head->next == head; }
static inline void tpr_base_list_add(tpr_base_list *head, tpr_base_list *node) {   // at the end
    node->next = head;
    node->prev = head->prev;
    head->prev->next = node;
    head->prev = node;
}
static inline void tpr_base_list_remove(tpr_base_list *node) {   // safe for a node that is in no list, when it was
                                                                 // inited
    node->prev->next = node->next;
    node->next->prev = node->prev;
    node->next = node->prev = node;
}

// ---- map: uint64_t to pointer, open addressing with linear probing; 0 is a key like any other

typedef struct tpr_base_entry { uint64_t key; void *value; } tpr_base_entry;   // value NULL: free
typedef struct tpr_base_map {
    tpr_base_memory *memory;
    tpr_base_entry  *entries;
    uint32_t         capacity, count;   // capacity: a power of two, or 0
} tpr_base_map;

static inline uint32_t tpr_base_map_at(const tpr_base_map *map, uint64_t key) {
    return (uint32_t)((key * UINT64_C(0x9e3779b97f4a7c15)) >> 32) & (map->capacity - 1);
}

static void *tpr_base_map_get(const tpr_base_map *map, uint64_t key) {
    if (!map->count) return NULL;
    for (uint32_t i = tpr_base_map_at(map, key);; i = (i + 1) & (map->capacity - 1)) {
        if (!map->entries[i].value) return NULL;
        if (map->entries[i].key == key) return map->entries[i].value;
    }
}

// Puts `value`, which is not NULL, in place of what was there. False: no memory.
static bool tpr_base_map_put(tpr_base_map *map, uint64_t key, void *value) {
    if ((map->count + 1) * 4 > map->capacity * 3) {
        uint32_t capacity = map->capacity ? map->capacity * 2 : 16;
        tpr_base_map bigger = *map;
        bigger.entries =
            (tpr_base_entry *)tpr_base_new(map->memory, capacity * sizeof(tpr_base_entry), TPR_TAG('m', 'a', 'p', ' '));
        if (!bigger.entries) return false;
        bigger.capacity = capacity;
        for (uint32_t i = 0; i < map->capacity; i++) {
            if (!map->entries[i].value) continue;
            uint32_t at = tpr_base_map_at(&bigger, map->entries[i].key);
            while (bigger.entries[at].value) at = (at + 1) & (capacity - 1);
            bigger.entries[at] = map->entries[i];
        }
        tpr_base_free(map->memory, map->entries, map->capacity * sizeof(tpr_base_entry), TPR_TAG('m', 'a', 'p', ' '));
        *map = bigger;
    }
    uint32_t at = tpr_base_map_at(map, key);
    while (map->entries[at].value && map->entries[at].key != key) at = (at + 1) & (map->capacity - 1);
    if (!map->entries[at].value) map->count++;
    map->entries[at].key = key;
    map->entries[at].value = value;
    return true;
}

// Takes a key out and closes the gap, so that no probe stops early. Returns what was there.
static void *tpr_base_map_remove(tpr_base_map *map, uint64_t key) {
    if (!map->count) return NULL;
    uint32_t mask = map->capacity - 1, at = tpr_base_map_at(map, key);
    while (map->entries[at].value && map->entries[at].key != key) at = (at + 1) & mask;
    void *value = map->entries[at].value;
    if (!value) return NULL;
    for (uint32_t next = (at + 1) & mask; map->entries[next].value; next = (next + 1) & mask) {
        uint32_t home = tpr_base_map_at(map, map->entries[next].key);
        if (((next - home) & mask) < ((next - at) & mask)) continue;   // it may not move before its home
        map->entries[at] = map->entries[next];
        at = next;
    }
    map->entries[at].value = NULL;
    map->count--;
    return value;
}

static void tpr_base_map_clear(tpr_base_map *map) {
    tpr_base_free(map->memory, map->entries, map->capacity * sizeof(tpr_base_entry), TPR_TAG('m', 'a', 'p', ' '));
    map->entries = NULL;
    map->capacity = map->count = 0;
}

// ---- slab: objects of one size that never move, found by index and generation; ids are never 0

enum { TPR_BASE_SLAB_CHUNK = 64, TPR_BASE_SLAB_CHUNKS = 1 << 18 };
// heads each object
typedef struct tpr_base_slot { uint32_t index, generation, next_free; uint32_t used; } tpr_base_slot;
typedef struct tpr_base_slab {
    tpr_base_memory *memory;
    uint8_t        **chunks;           // chunk_capacity pointers
    uint32_t         object_size, chunk_count, chunk_capacity, free_head, used, limit;   // free_head: index + 1, 0 none
} tpr_base_slab;

static inline tpr_base_slot *tpr_base_slab_at(const tpr_base_slab *slab, uint32_t index) {
    return (tpr_base_slot *)(void *)(slab->chunks[index / TPR_BASE_SLAB_CHUNK] +
                                     (size_t)(index % TPR_BASE_SLAB_CHUNK) * slab->object_size);
}

static bool tpr_base_slab_grow(tpr_base_slab *slab) {
    uint32_t tag = TPR_TAG('s', 'l', 'a', 'b');
    if (slab->chunk_count == TPR_BASE_SLAB_CHUNKS) return false;
    if (slab->chunk_count == slab->chunk_capacity) {
        uint32_t capacity = slab->chunk_capacity ? slab->chunk_capacity * 2 : 16;
        uint8_t **chunks = (uint8_t **)tpr_base_new(slab->memory, capacity * sizeof *chunks, tag);
        if (!chunks) return false;
        if (slab->chunk_count) memcpy(chunks, slab->chunks, slab->chunk_count * sizeof *chunks);
        tpr_base_free(slab->memory, slab->chunks, slab->chunk_capacity * sizeof *chunks, tag);
        slab->chunks = chunks;
        slab->chunk_capacity = capacity;
    }
    uint8_t *chunk = (uint8_t *)tpr_base_new(slab->memory, (size_t)slab->object_size * TPR_BASE_SLAB_CHUNK, tag);
    if (!chunk) return false;
    slab->chunks[slab->chunk_count++] = chunk;
    for (uint32_t i = TPR_BASE_SLAB_CHUNK; i-- > 0;) {
        uint32_t index = (slab->chunk_count - 1) * TPR_BASE_SLAB_CHUNK + i;
        tpr_base_slot *slot = tpr_base_slab_at(slab, index);
        slot->index = index;
        slot->generation = 1;
        slot->next_free = slab->free_head;
        slab->free_head = index + 1;
    }
    return true;
}

// A free object, its slot header set, the rest as the last user left it (zero at first). NULL: the limit, or no memory.
static inline tpr_base_slot *tpr_base_slab_take(tpr_base_slab *slab) {
    if (TPR_UNLIKELY(slab->used >= slab->limit)) return NULL;
    if (TPR_UNLIKELY(!slab->free_head) && !tpr_base_slab_grow(slab)) return NULL;
    tpr_base_slot *slot = tpr_base_slab_at(slab, slab->free_head - 1);
    slab->free_head = slot->next_free;
    slot->used = 1;
    slab->used++;
    return slot;
}

static inline void tpr_base_slab_give(tpr_base_slab *slab, tpr_base_slot *slot) {
    slot->used = 0;
    if (++slot->generation == 0) slot->generation = 1;
    slot->next_free = slab->free_head;
    slab->free_head = slot->index + 1;
    slab->used--;
}

// The object, if it is still the one that was meant.
static inline tpr_base_slot *tpr_base_slab_find(const tpr_base_slab *slab, uint32_t index, uint32_t generation) {
    if (index >= slab->chunk_count * TPR_BASE_SLAB_CHUNK) return NULL;
    tpr_base_slot *slot = tpr_base_slab_at(slab, index);
    return slot->used && slot->generation == generation ? slot : NULL;
}

static void tpr_base_slab_clear(tpr_base_slab *slab) {
    uint32_t tag = TPR_TAG('s', 'l', 'a', 'b');
    for (uint32_t i = 0; i < slab->chunk_count; i++)
        tpr_base_free(slab->memory, slab->chunks[i], (size_t)slab->object_size * TPR_BASE_SLAB_CHUNK, tag);
    tpr_base_free(slab->memory, slab->chunks, slab->chunk_capacity * sizeof *slab->chunks, tag);
    slab->chunks = NULL;
    slab->chunk_count = slab->chunk_capacity = slab->free_head = slab->used = 0;
}

// ---- bytes and names

// By memcpy, which is one instruction: compilers do not find out that four bytes stored one by one are a word.
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tprpc: the wire is little endian; add the byte swaps of a big-endian machine here"
#endif
static inline uint16_t tpr_base_load_le16(const uint8_t *p) { uint16_t v; memcpy(&v, p, sizeof v); return v; }
static inline uint32_t tpr_base_load_le32(const uint8_t *p) { uint32_t v; memcpy(&v, p, sizeof v); return v; }
static inline uint64_t tpr_base_load_le64(const uint8_t *p) { uint64_t v; memcpy(&v, p, sizeof v); return v; }
static inline void tpr_base_store_le16(uint8_t *p, uint16_t v) { memcpy(p, &v, sizeof v); }
static inline void tpr_base_store_le32(uint8_t *p, uint32_t v) { memcpy(p, &v, sizeof v); }
static inline void tpr_base_store_le64(uint8_t *p, uint64_t v) { memcpy(p, &v, sizeof v); }

typedef struct tpr_base_bytes { const uint8_t *data; size_t size; } tpr_base_bytes;
static inline tpr_base_bytes tpr_base_bytes_none(void) { tpr_base_bytes none = {NULL, 0}; return none; }

// memcpy that takes NULL with size 0.
static inline void tpr_base_copy(void *to, const void *from, size_t size) {
    if (size) memcpy(to, from, size);
}

// A few words: gcc makes `rep movs` of a memcpy whose size it can bound, which takes longer to begin than this takes.
static inline void tpr_base_copy_few(uint8_t *to, const uint8_t *from, size_t size) {
    for (; size >= 8; to += 8, from += 8, size -= 8) memcpy(to, from, 8);
    while (size-- > 0) to[size] = from[size];
}

// The length of the UTF-8 sequence that starts at p, 0 when it is none (overlong forms and surrogates are none).
static size_t tpr_base_utf8_length(const uint8_t *p, size_t left) {
    size_t n = p[0] < 0x80                   ? 1
               : p[0] >= 0xc2 && p[0] < 0xe0 ? 2
               : (p[0] & 0xf0) == 0xe0       ? 3
               : p[0] >= 0xf0 && p[0] < 0xf5 ? 4
                                             : 0;
    if (n == 0 || n > left) return 0;
    for (size_t i = 1; i < n; i++) if ((p[i] & 0xc0) != 0x80) return 0;
    if (p[0] == 0xe0 && p[1] < 0xa0) return 0;
    if (p[0] == 0xed && p[1] > 0x9f) return 0;
    if (p[0] == 0xf0 && p[1] < 0x90) return 0;
    if (p[0] == 0xf4 && p[1] > 0x8f) return 0;
    return n;
}

// NULL when `name` may be one (1 to `limit` bytes of UTF-8 without control characters), else what is wrong with it.
TPR_COLD static const char *tpr_base_name_fault(const char *name, size_t size, size_t limit) {
    if (!name || size == 0) return "is empty";
    if (size > limit) return "is too long";
    for (size_t i = 0; i < size;) {
        size_t n = tpr_base_utf8_length((const uint8_t *)name + i, size - i);
        if (n == 0) return "is not UTF-8";
        if ((uint8_t)name[i] < 0x20 || name[i] == 0x7f) return "has a control character";
        i += n;
    }
    return NULL;
}

static bool tpr_base_starts_with(const char *text, const char *prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

// Whether a comma-separated list names `name`; *rank (NULL allowed) becomes its place.
static bool tpr_base_list_names(const char *list, const char *name, uint32_t *rank) {
    size_t length = strlen(name);
    uint32_t place = 0;
    for (const char *at = list; *at; place++) {
        size_t n = strcspn(at, ",");
        if (n == length && memcmp(at, name, n) == 0) {
            if (rank) *rank = place;
            return true;
        }
        at += n + (at[n] == ',');
    }
    return false;
}

// ---- public

TPRPC_API int32_t tprpc_version(void) { return TPRPC_VERSION; }

TPRPC_API const char *tprpc_status_name(tprpc_status status) {
    static const char *const names[] = {"ok", "pending", "invalid", "memory", "limit", "timeout", "cancelled", "closed",
                                        "peer", "unreachable", "protocol", "denied", "unsupported", "no_worker",
                                        "no_method", "remote", "device", "system"};
    return (size_t)status < TPR_COUNT(names) ? names[status] : "unknown";
}

TPRPC_API size_t tprpc_dtype_size(int32_t dtype) {
    static const uint8_t sizes[] = {1, 1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 8, 16};
    return dtype >= 0 && (size_t)dtype < TPR_COUNT(sizes) ? sizes[dtype] : 0;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_error_set(tprpc_error *error, tprpc_status status, int32_t os_code, const char *text,
                                       ...) {
    va_list args;
    if (!error) return status;
    error->status = status;
    error->os_code = os_code;
    error->user_code = 0;
    error->text[0] = 0;
    va_start(args, text);
    if (text) vsnprintf(error->text, sizeof error->text, text, args);
    va_end(args);
    return status;
}

// >>wire --------------------------------------------------------------------------------------------------------------
// Every byte that a peer can send is decoded here and nowhere else. Little endian, fixed layouts; each length is
// checked against a limit before it is believed; fields that trail what is known are skipped.
//
// Uses: atomic, os, base.
// Invariant: a reader never looks past `end`; after its first failure it stays failed and yields zeros, so a decoder
// reads all of its fields and checks once. A writer that is full stays failed and writes nothing more.

enum {
    TPR_WIRE_MAGIC = 0x50525054,          // "TPRP"
    TPR_WIRE_MAJOR = 1, TPR_WIRE_MINOR = 2,
    TPR_WIRE_HEADER = 8,                  // u32 size of the body, u8 kind, u8 handles, u16 channel
    TPR_WIRE_DATA_HEADER = 16,            // u64 transfer, u64 offset; the bytes follow
    TPR_WIRE_MOVE_BYTES = 36, TPR_WIRE_LANE_BYTES = 48,   // of the bodies of these
    TPR_WIRE_MESSAGE_HEADER = 16,
    TPR_WIRE_FIRST = 4096,                // the most that is read of a peer before it is known
    TPR_WIRE_CONTROL = 16384,             // the largest body of a frame that is neither message nor data
    TPR_WIRE_CHUNK = 1 << 20,             // the largest piece of bulk
    TPR_WIRE_DESCRIPTOR = 4096,           // a channel's bytes in a message
    TPR_WIRE_OFFERS = 32, TPR_WIRE_CHANNELS = 16, TPR_WIRE_PROOF = 256, TPR_WIRE_PREFIX = 40,
    TPR_WIRE_ADDRESS = 112                // an address, "name://rest", with its final 0
};

enum {
    TPR_WIRE_HELLO = 1,
    TPR_WIRE_MOVE,
    TPR_WIRE_MOVED,
    TPR_WIRE_AGREE,
    TPR_WIRE_MESSAGE,
    TPR_WIRE_CHANNEL,
    TPR_WIRE_DATA,
    TPR_WIRE_CREDIT,
    TPR_WIRE_BYE,
    TPR_WIRE_LANE,                        // since 1.2: a connection's first frame, it becomes a pipe's lane;
    TPR_WIRE_LANED,                       // the answer, and the answer to that;
    TPR_WIRE_WANT,                        // who listened wants so many lanes (u32);
    TPR_WIRE_LOST                         // a lane has ended at who says it
};

typedef struct tpr_wire_reader { const uint8_t *at, *end; bool failed; } tpr_wire_reader;
typedef struct tpr_wire_writer { uint8_t *at, *end; bool failed; } tpr_wire_writer;

static inline tpr_wire_reader tpr_wire_reader_of(const void *bytes, size_t size) {
    tpr_wire_reader r;
    r.at = (const uint8_t *)bytes;
    r.end = r.at + size;
    r.failed = false;
    return r;
}

static inline tpr_wire_writer tpr_wire_writer_of(void *bytes, size_t size) {
    tpr_wire_writer w;
    w.at = (uint8_t *)bytes;
    w.end = w.at + size;
    w.failed = false;
    return w;
}

static inline bool tpr_wire_take(tpr_wire_reader *r, size_t size) {
    if (TPR_UNLIKELY(r->failed || (size_t)(r->end - r->at) < size)) r->failed = true;
    return !r->failed;
}

static inline uint8_t tpr_wire_read_u8(tpr_wire_reader *r) { return tpr_wire_take(r, 1) ? *r->at++ : (uint8_t)0; }

static inline uint16_t tpr_wire_read_u16(tpr_wire_reader *r) {
    if (!tpr_wire_take(r, 2)) return 0;
    r->at += 2;
    return tpr_base_load_le16(r->at - 2);
}

static inline uint32_t tpr_wire_read_u32(tpr_wire_reader *r) {
    if (!tpr_wire_take(r, 4)) return 0;
    r->at += 4;
    return tpr_base_load_le32(r->at - 4);
}

static inline uint64_t tpr_wire_read_u64(tpr_wire_reader *r) {
    if (!tpr_wire_take(r, 8)) return 0;
    r->at += 8;
    return tpr_base_load_le64(r->at - 8);
}

// The next `size` bytes, where they are.
static inline tpr_base_bytes tpr_wire_read_raw(tpr_wire_reader *r, size_t size) {
    tpr_base_bytes bytes = tpr_base_bytes_none();
    if (!tpr_wire_take(r, size)) return bytes;
    bytes.data = r->at;
    bytes.size = size;
    r->at += size;
    return bytes;
}

// The next `size` bytes into `out`, which a failure leaves alone.
static inline void tpr_wire_read_into(tpr_wire_reader *r, void *out, size_t size) {
    tpr_base_bytes bytes = tpr_wire_read_raw(r, size);
    tpr_base_copy(out, bytes.data, bytes.size);
}

// A byte string of at most `limit` bytes, length first. The bytes stay where they are.
static tpr_base_bytes tpr_wire_read_bytes(tpr_wire_reader *r, uint32_t limit) {
    uint32_t size = tpr_wire_read_u32(r);
    if (size > limit) r->failed = true;
    return tpr_wire_read_raw(r, size);
}

// A string into `out` of `capacity` bytes, the final 0 included; one with a 0 inside is refused.
static void tpr_wire_read_text(tpr_wire_reader *r, char *out, uint32_t capacity) {
    tpr_base_bytes bytes = tpr_wire_read_bytes(r, capacity - 1);
    if (bytes.size && memchr(bytes.data, 0, bytes.size)) r->failed = true;
    if (r->failed) bytes.size = 0;
    tpr_base_copy(out, bytes.data, bytes.size);
    out[bytes.size] = 0;
}

static inline bool tpr_wire_room(tpr_wire_writer *w, size_t size) {
    if (TPR_UNLIKELY(w->failed || (size_t)(w->end - w->at) < size)) w->failed = true;
    return !w->failed;
}

static inline void tpr_wire_write_u8(tpr_wire_writer *w, uint8_t v) { if (tpr_wire_room(w, 1)) *w->at++ = v; }

static inline void tpr_wire_write_u16(tpr_wire_writer *w, uint16_t v) {
    if (!tpr_wire_room(w, 2)) return;
    tpr_base_store_le16(w->at, v);
    w->at += 2;
}

static inline void tpr_wire_write_u32(tpr_wire_writer *w, uint32_t v) {
    if (!tpr_wire_room(w, 4)) return;
    tpr_base_store_le32(w->at, v);
    w->at += 4;
}

static inline void tpr_wire_write_u64(tpr_wire_writer *w, uint64_t v) {
    if (!tpr_wire_room(w, 8)) return;
    tpr_base_store_le64(w->at, v);
    w->at += 8;
}

static inline void tpr_wire_write_raw(tpr_wire_writer *w, const void *bytes, size_t size) {
    if (!tpr_wire_room(w, size)) return;
    tpr_base_copy(w->at, bytes, size);
    w->at += size;
}

static void tpr_wire_write_bytes(tpr_wire_writer *w, const void *bytes, size_t size) {
    tpr_wire_write_u32(w, (uint32_t)size);
    tpr_wire_write_raw(w, bytes, size);
}

static void tpr_wire_write_text(tpr_wire_writer *w, const char *text) { tpr_wire_write_bytes(w, text, strlen(text)); }

// ---- frames

typedef struct tpr_wire_frame { uint32_t size; uint8_t kind, handles; uint16_t channel; } tpr_wire_frame;

static inline void tpr_wire_put_frame(uint8_t *out, uint32_t size, uint8_t kind, uint8_t handles, uint16_t channel) {
    tpr_base_store_le32(out, size);
    out[4] = kind;
    out[5] = handles;
    tpr_base_store_le16(out + 6, channel);
}

// Reads a frame's header. message_limit: the largest body of a message. False: no frame of ours.
static inline bool tpr_wire_get_frame(const uint8_t *in, uint64_t message_limit, tpr_wire_frame *out) {
    out->size = tpr_base_load_le32(in);
    out->kind = in[4];
    out->handles = in[5];
    out->channel = tpr_base_load_le16(in + 6);
    if (out->handles > TPR_OS_HANDLES || (out->handles && out->kind != TPR_WIRE_CHANNEL)) return false;
    switch (out->kind) {
    case TPR_WIRE_MESSAGE: return out->size >= TPR_WIRE_MESSAGE_HEADER && out->size <= message_limit;
    case TPR_WIRE_DATA: return out->size > TPR_WIRE_DATA_HEADER && out->size <= TPR_WIRE_DATA_HEADER + TPR_WIRE_CHUNK;
    case TPR_WIRE_HELLO: case TPR_WIRE_MOVE: case TPR_WIRE_MOVED: case TPR_WIRE_LANE: case TPR_WIRE_LANED:
        return out->size <= TPR_WIRE_FIRST;
    case TPR_WIRE_AGREE: case TPR_WIRE_CHANNEL: case TPR_WIRE_CREDIT: case TPR_WIRE_BYE: case TPR_WIRE_WANT:
    case TPR_WIRE_LOST:
        return out->size <= TPR_WIRE_CONTROL;
    default: return false;
    }
}

// ---- hello, move, agree, bye

typedef struct tpr_wire_offer {       // a backend as the other end may use it
    char     name[16];
    bool     channel;
    uint8_t  domain_size, domain[64];
    char     address[TPR_WIRE_ADDRESS];   // of a transport, where it listens for this pipe; "" for none
} tpr_wire_offer;

typedef struct tpr_wire_hello {
    uint16_t major, minor;
    uint8_t  nonce[16], token[16];    // of the context; that lets a second connection join this pipe
    uint64_t message_bytes, metadata_bytes;   // the limits of who says it
    uint32_t tensors, window, offer_count;
    tpr_wire_offer offers[TPR_WIRE_OFFERS];
    uint64_t space;                   // since 1.1: what `process`, who says it, is counted in; 0: cannot be told
    uint32_t process;
} tpr_wire_hello;

static void tpr_wire_write_hello(tpr_wire_writer *w, const tpr_wire_hello *hello) {
    tpr_wire_write_u32(w, (uint32_t)TPR_WIRE_MAGIC);
    tpr_wire_write_u16(w, hello->major);
    tpr_wire_write_u16(w, hello->minor);
    tpr_wire_write_raw(w, hello->nonce, 16);
    tpr_wire_write_raw(w, hello->token, 16);
    tpr_wire_write_u64(w, hello->message_bytes);
    tpr_wire_write_u64(w, hello->metadata_bytes);
    tpr_wire_write_u32(w, hello->tensors);
    tpr_wire_write_u32(w, hello->window);
    tpr_wire_write_u32(w, hello->offer_count);
    for (uint32_t i = 0; i < hello->offer_count; i++) {
        const tpr_wire_offer *offer = &hello->offers[i];
        tpr_wire_write_u8(w, offer->channel);
        tpr_wire_write_text(w, offer->name);
        tpr_wire_write_bytes(w, offer->domain, offer->domain_size);
        tpr_wire_write_text(w, offer->address);
    }
    if (hello->minor >= 1) {
        tpr_wire_write_u64(w, hello->space);
        tpr_wire_write_u32(w, hello->process);
    }
}

// False: not a tprpc peer, or a broken one. A peer of another major version gives true and no offers.
static bool tpr_wire_read_hello(const uint8_t *bytes, size_t size, tpr_wire_hello *out) {
    tpr_wire_reader r = tpr_wire_reader_of(bytes, size);
    memset(out, 0, sizeof *out);
    if (tpr_wire_read_u32(&r) != TPR_WIRE_MAGIC) return false;
    out->major = tpr_wire_read_u16(&r);
    out->minor = tpr_wire_read_u16(&r);
    if (!r.failed && out->major != TPR_WIRE_MAJOR) return true;
    tpr_wire_read_into(&r, out->nonce, 16);
    tpr_wire_read_into(&r, out->token, 16);
    out->message_bytes = tpr_wire_read_u64(&r);
    out->metadata_bytes = tpr_wire_read_u64(&r);
    out->tensors = tpr_wire_read_u32(&r);
    out->window = tpr_wire_read_u32(&r);
    out->offer_count = tpr_wire_read_u32(&r);
    if (out->offer_count > TPR_WIRE_OFFERS) r.failed = true;
    for (uint32_t i = 0; i < out->offer_count && !r.failed; i++) {
        tpr_wire_offer *offer = &out->offers[i];
        offer->channel = tpr_wire_read_u8(&r) != 0;
        tpr_wire_read_text(&r, offer->name, sizeof offer->name);
        tpr_base_bytes domain = tpr_wire_read_bytes(&r, sizeof offer->domain);
        tpr_base_copy(offer->domain, domain.data, domain.size);
        offer->domain_size = (uint8_t)domain.size;
        tpr_wire_read_text(&r, offer->address, sizeof offer->address);
    }
    if (out->minor >= 1) {
        out->space = tpr_wire_read_u64(&r);
        out->process = tpr_wire_read_u32(&r);
    }
    return !r.failed;
}

typedef struct tpr_wire_move { uint8_t token[16], nonce[16]; } tpr_wire_move;   // the answer gives the nonce back

static void tpr_wire_write_move(tpr_wire_writer *w, const tpr_wire_move *move) {
    tpr_wire_write_u32(w, (uint32_t)TPR_WIRE_MAGIC);
    tpr_wire_write_raw(w, move->token, 16);
    tpr_wire_write_raw(w, move->nonce, 16);
}

TPR_COLD static bool tpr_wire_read_move(const uint8_t *bytes, size_t size, tpr_wire_move *out) {
    tpr_wire_reader r = tpr_wire_reader_of(bytes, size);
    memset(out, 0, sizeof *out);
    if (tpr_wire_read_u32(&r) != TPR_WIRE_MAGIC) return false;
    tpr_wire_read_into(&r, out->token, 16);
    tpr_wire_read_into(&r, out->nonce, 16);
    return !r.failed;
}

// The body of LANE, LANED and LOST. A lane is known by its number, from 1 on, and a nonce that none before it had.
typedef struct tpr_wire_lane {
    tpr_wire_move move;               // token: of the end it is said to, which it had from the other's hello
    uint32_t number;
    uint64_t sent;                    // bytes of bulk that who says it sent over it; in LANE: over the one before
} tpr_wire_lane;

static void tpr_wire_write_lane(tpr_wire_writer *w, const tpr_wire_lane *lane) {
    tpr_wire_write_move(w, &lane->move);
    tpr_wire_write_u32(w, lane->number);
    tpr_wire_write_u64(w, lane->sent);
}

TPR_COLD static bool tpr_wire_read_lane(const uint8_t *bytes, size_t size, tpr_wire_lane *out) {
    if (size < TPR_WIRE_LANE_BYTES || !tpr_wire_read_move(bytes, size, &out->move)) return false;
    out->number = tpr_base_load_le32(bytes + TPR_WIRE_MOVE_BYTES);
    out->sent = tpr_base_load_le64(bytes + TPR_WIRE_MOVE_BYTES + 4);
    return true;
}

// Four frames prove the channels that both ends have: the connector's challenges; the acceptor's challenges and
// answers; the connector's answers and verdicts; the acceptor's verdicts. All name the channels in the connector's
// order.
typedef struct tpr_wire_proof {
    char    name[16];
    uint8_t challenge[TPR_WIRE_PROOF], answer[TPR_WIRE_PROOF];
    uint32_t challenge_size, answer_size;
    bool    verdict;
} tpr_wire_proof;

typedef struct tpr_wire_agree { uint32_t step, count; tpr_wire_proof proofs[TPR_WIRE_CHANNELS]; } tpr_wire_agree;

static void tpr_wire_write_agree(tpr_wire_writer *w, const tpr_wire_agree *agree) {
    tpr_wire_write_u32(w, agree->step);
    tpr_wire_write_u32(w, agree->count);
    for (uint32_t i = 0; i < agree->count; i++) {
        const tpr_wire_proof *proof = &agree->proofs[i];
        tpr_wire_write_text(w, proof->name);
        tpr_wire_write_bytes(w, proof->challenge, proof->challenge_size);
        tpr_wire_write_bytes(w, proof->answer, proof->answer_size);
        tpr_wire_write_u8(w, proof->verdict);
    }
}

static bool tpr_wire_read_agree(const uint8_t *bytes, size_t size, tpr_wire_agree *out) {
    tpr_wire_reader r = tpr_wire_reader_of(bytes, size);
    out->step = tpr_wire_read_u32(&r);
    out->count = tpr_wire_read_u32(&r);
    if (out->count > TPR_WIRE_CHANNELS) r.failed = true;
    for (uint32_t i = 0; i < out->count && !r.failed; i++) {
        tpr_wire_proof *proof = &out->proofs[i];
        tpr_wire_read_text(&r, proof->name, sizeof proof->name);
        tpr_base_bytes challenge = tpr_wire_read_bytes(&r, TPR_WIRE_PROOF);
        tpr_base_bytes answer = tpr_wire_read_bytes(&r, TPR_WIRE_PROOF);
        tpr_base_copy(proof->challenge, challenge.data, challenge.size);
        tpr_base_copy(proof->answer, answer.data, answer.size);
        proof->challenge_size = (uint32_t)challenge.size;
        proof->answer_size = (uint32_t)answer.size;
        proof->verdict = tpr_wire_read_u8(&r) != 0;
    }
    return !r.failed;
}

static void tpr_wire_write_bye(tpr_wire_writer *w, tprpc_status status, const char *text) {
    tpr_wire_write_u32(w, (uint32_t)status);
    tpr_wire_write_text(w, text);
}

static bool tpr_wire_read_bye(const uint8_t *bytes, size_t size, tprpc_status *status, char *text, uint32_t capacity) {
    tpr_wire_reader r = tpr_wire_reader_of(bytes, size);
    uint32_t code = tpr_wire_read_u32(&r);
    tpr_wire_read_text(&r, text, capacity);
    *status = code <= (uint32_t)TPRPC_ERROR_SYSTEM ? (tprpc_status)code : TPRPC_ERROR_SYSTEM;
    return !r.failed;
}

// ---- messages: header, payloads, tensors, transfers, prefix, metadata of all, inline bytes of all

enum { TPR_WIRE_INLINE = 255 };       // an item's `transfer` when its bytes are within the message

typedef struct tpr_wire_message {
    uint32_t metadata_size;
    uint16_t payloads, tensors;
    uint8_t  transfers, prefix_size;
} tpr_wire_message;

typedef struct tpr_wire_item {        // a payload or a tensor
    uint64_t size;
    uint32_t metadata_size;
    uint8_t  transfer;                // which of the message's, or TPR_WIRE_INLINE
    uint8_t  dtype, ndim;             // of a tensor, as the rest
    tprpc_device device, target;
    int64_t  shape[TPRPC_MAX_DIMS];
} tpr_wire_item;

typedef struct tpr_wire_transfer { uint64_t id; uint16_t channel; tpr_base_bytes descriptor; } tpr_wire_transfer;

static inline size_t tpr_wire_tensor_bytes(int32_t ndim) { return 32 + 8 * (size_t)ndim; }
enum { TPR_WIRE_PAYLOAD_BYTES = 16, TPR_WIRE_TRANSFER_BYTES = 12 };

// Whether a tensor's shape and dtype amount to its size.
static bool tpr_wire_shape_fits(int32_t dtype, int32_t ndim, const int64_t *shape, uint64_t size) {
    uint64_t total = tprpc_dtype_size(dtype);
    bool empty = false;
    if (!total || ndim < 0 || ndim > TPRPC_MAX_DIMS) return false;
    if (dtype == TPRPC_BYTES && ndim == 0) return true;
    for (int32_t i = 0; i < ndim; i++) {
        if (shape[i] < 0) return false;
        empty |= shape[i] == 0;
    }
    if (empty) return size == 0;
    for (int32_t i = 0; i < ndim; i++) {
        if (total > size / (uint64_t)shape[i]) return false;
        total *= (uint64_t)shape[i];
    }
    return total == size;
}

static inline void tpr_wire_write_message(tpr_wire_writer *w, const tpr_wire_message *m) {
    tpr_wire_write_u32(w, m->metadata_size);
    tpr_wire_write_u16(w, m->payloads);
    tpr_wire_write_u16(w, m->tensors);
    tpr_wire_write_u8(w, m->transfers);
    tpr_wire_write_u8(w, m->prefix_size);
    tpr_wire_write_u16(w, 0);
    tpr_wire_write_u32(w, 0);
}

// The heads of a frame with a short message: one that has nothing but a prefix and metadata.
enum { TPR_WIRE_SHORT = TPR_WIRE_HEADER + TPR_WIRE_MESSAGE_HEADER };

static inline void tpr_wire_put_short(uint8_t *out, uint32_t metadata_size, uint8_t prefix_size) {
    uint8_t *head = out + TPR_WIRE_HEADER;
    tpr_wire_put_frame(out, (uint32_t)TPR_WIRE_MESSAGE_HEADER + prefix_size + metadata_size, TPR_WIRE_MESSAGE, 0, 0);
    tpr_base_store_le64(head, metadata_size);
    tpr_base_store_le64(head + 8, (uint64_t)prefix_size << 8);
}

// Reads them back. False: it is none, or not one that says so in exactly this way.
static inline bool tpr_wire_get_short(const uint8_t *in, uint32_t *metadata_size, uint8_t *prefix_size) {
    const uint8_t *head = in + TPR_WIRE_HEADER;
    uint32_t size = tpr_base_load_le32(in);
    uint64_t sizes = tpr_base_load_le64(head), rest = tpr_base_load_le64(head + 8);
    *metadata_size = (uint32_t)sizes;
    *prefix_size = (uint8_t)(rest >> 8);
    return in[4] == TPR_WIRE_MESSAGE && in[5] == 0 && sizes <= size && (rest & ~(uint64_t)0xff00) == 0 &&
           *prefix_size <= TPR_WIRE_PREFIX && (uint64_t)TPR_WIRE_MESSAGE_HEADER + *prefix_size + sizes == size;
}

static inline void tpr_wire_read_message(tpr_wire_reader *r, tpr_wire_message *m) {
    m->metadata_size = tpr_wire_read_u32(r);
    m->payloads = tpr_wire_read_u16(r);
    m->tensors = tpr_wire_read_u16(r);
    m->transfers = tpr_wire_read_u8(r);
    m->prefix_size = tpr_wire_read_u8(r);
    tpr_wire_read_u16(r);
    tpr_wire_read_u32(r);
    if (m->prefix_size > TPR_WIRE_PREFIX || m->transfers > TPR_WIRE_CHANNELS) r->failed = true;
}

static void tpr_wire_write_payload(tpr_wire_writer *w, const tpr_wire_item *item) {
    tpr_wire_write_u64(w, item->size);
    tpr_wire_write_u32(w, item->metadata_size);
    tpr_wire_write_u8(w, item->transfer);
    tpr_wire_write_u8(w, 0);
    tpr_wire_write_u16(w, 0);
}

static void tpr_wire_read_payload(tpr_wire_reader *r, tpr_wire_item *item, uint32_t transfers) {
    item->size = tpr_wire_read_u64(r);
    item->metadata_size = tpr_wire_read_u32(r);
    item->transfer = tpr_wire_read_u8(r);
    tpr_wire_read_u8(r);
    tpr_wire_read_u16(r);
    if (item->transfer != TPR_WIRE_INLINE && item->transfer >= transfers) r->failed = true;
}

static void tpr_wire_write_tensor(tpr_wire_writer *w, const tpr_wire_item *item) {
    tpr_wire_write_u64(w, item->size);
    tpr_wire_write_u32(w, item->metadata_size);
    tpr_wire_write_u8(w, item->transfer);
    tpr_wire_write_u8(w, item->dtype);
    tpr_wire_write_u8(w, item->ndim);
    tpr_wire_write_u8(w, 0);
    tpr_wire_write_u32(w, (uint32_t)item->device.kind);
    tpr_wire_write_u32(w, (uint32_t)item->device.index);
    tpr_wire_write_u32(w, (uint32_t)item->target.kind);
    tpr_wire_write_u32(w, (uint32_t)item->target.index);
    for (uint32_t i = 0; i < item->ndim; i++) tpr_wire_write_u64(w, (uint64_t)item->shape[i]);
}

static void tpr_wire_read_tensor(tpr_wire_reader *r, tpr_wire_item *item, uint32_t transfers) {
    item->size = tpr_wire_read_u64(r);
    item->metadata_size = tpr_wire_read_u32(r);
    item->transfer = tpr_wire_read_u8(r);
    item->dtype = tpr_wire_read_u8(r);
    item->ndim = tpr_wire_read_u8(r);
    tpr_wire_read_u8(r);
    item->device.kind = (int32_t)tpr_wire_read_u32(r);
    item->device.index = (int32_t)tpr_wire_read_u32(r);
    item->target.kind = (int32_t)tpr_wire_read_u32(r);
    item->target.index = (int32_t)tpr_wire_read_u32(r);
    if (item->ndim > TPRPC_MAX_DIMS) r->failed = true;
    for (uint32_t i = 0; i < item->ndim && !r->failed; i++) item->shape[i] = (int64_t)tpr_wire_read_u64(r);
    if (item->transfer != TPR_WIRE_INLINE && item->transfer >= transfers) r->failed = true;
    if (!r->failed && !tpr_wire_shape_fits(item->dtype, item->ndim, item->shape, item->size)) r->failed = true;
}

static void tpr_wire_write_transfer(tpr_wire_writer *w, const tpr_wire_transfer *transfer) {
    tpr_wire_write_u64(w, transfer->id);
    tpr_wire_write_u16(w, transfer->channel);
    tpr_wire_write_u16(w, (uint16_t)transfer->descriptor.size);
    tpr_wire_write_raw(w, transfer->descriptor.data, transfer->descriptor.size);
}

static void tpr_wire_read_transfer(tpr_wire_reader *r, tpr_wire_transfer *transfer) {
    transfer->id = tpr_wire_read_u64(r);
    transfer->channel = tpr_wire_read_u16(r);
    uint16_t size = tpr_wire_read_u16(r);
    if (size > TPR_WIRE_DESCRIPTOR) r->failed = true;
    transfer->descriptor = tpr_wire_read_raw(r, size);
}

// ---- calls: the prefix of a message between agents, and the bodies that are not a user's

enum { TPR_WIRE_CALL = 1, TPR_WIRE_REPLY, TPR_WIRE_ERROR, TPR_WIRE_CANCEL, TPR_WIRE_INTRO };
enum { TPR_WIRE_CALL_BYTES = 24, TPR_WIRE_CALL_ONE_WAY = 1 };

typedef struct tpr_wire_call {
    uint8_t  kind, flags;
    uint32_t method, lane, timeout_ms;   // timeout_ms 0: none
    uint64_t id;
} tpr_wire_call;

static inline void tpr_wire_put_call(uint8_t *out, const tpr_wire_call *call) {
    out[0] = call->kind;
    out[1] = call->flags;
    out[2] = out[3] = 0;
    tpr_base_store_le32(out + 4, call->method);
    tpr_base_store_le64(out + 8, call->id);
    tpr_base_store_le32(out + 16, call->lane);
    tpr_base_store_le32(out + 20, call->timeout_ms);
}

static inline bool tpr_wire_get_call(const uint8_t *in, size_t size, tpr_wire_call *call) {
    if (size < TPR_WIRE_CALL_BYTES) return false;
    call->kind = in[0];
    call->flags = in[1];
    call->method = tpr_base_load_le32(in + 4);
    call->id = tpr_base_load_le64(in + 8);
    call->lane = tpr_base_load_le32(in + 16);
    call->timeout_ms = tpr_base_load_le32(in + 20);
    return call->kind >= TPR_WIRE_CALL && call->kind <= TPR_WIRE_INTRO;
}

// The body of an ERROR.
static size_t tpr_wire_put_error(uint8_t *out, size_t size, tprpc_status status, int32_t user_code, const char *text) {
    tpr_wire_writer w = tpr_wire_writer_of(out, size);
    tpr_wire_write_u32(&w, (uint32_t)status);
    tpr_wire_write_u32(&w, (uint32_t)user_code);
    tpr_wire_write_text(&w, text);
    return w.failed ? 0 : (size_t)(w.at - out);
}

static bool tpr_wire_get_error(const void *in, size_t size, tprpc_error *error) {
    tpr_wire_reader r = tpr_wire_reader_of(in, size);
    uint32_t status = tpr_wire_read_u32(&r);
    memset(error, 0, sizeof *error);
    error->user_code = (int32_t)tpr_wire_read_u32(&r);
    tpr_wire_read_text(&r, error->text, sizeof error->text);
    error->status = status >= (uint32_t)TPRPC_ERROR_INVALID && status <= (uint32_t)TPRPC_ERROR_SYSTEM
                        ? (tprpc_status)status
                        : TPRPC_ERROR_REMOTE;
    return !r.failed;
}

// The body of an INTRO: who calls.
static size_t tpr_wire_put_intro(uint8_t *out, size_t size, const char *name, uint32_t rank) {
    tpr_wire_writer w = tpr_wire_writer_of(out, size);
    tpr_wire_write_u32(&w, rank);
    tpr_wire_write_text(&w, name);
    return w.failed ? 0 : (size_t)(w.at - out);
}

static bool tpr_wire_get_intro(const void *in, size_t size, char *name, uint32_t capacity, uint32_t *rank) {
    tpr_wire_reader r = tpr_wire_reader_of(in, size);
    *rank = tpr_wire_read_u32(&r);
    tpr_wire_read_text(&r, name, capacity);
    return !r.failed && tpr_base_name_fault(name, strlen(name), capacity - 1) == NULL;
}

// What a worker publishes in the store: its name, a word that tells it from another of that name, its addresses, and
// its process as in a hello (0 where an older one did not say).
enum { TPR_WIRE_NAME = 129, TPR_WIRE_ADDRESSES = 8 };
typedef struct tpr_wire_worker {
    char     name[TPR_WIRE_NAME];
    uint64_t nonce;
    uint32_t rank, address_count;
    char     addresses[TPR_WIRE_ADDRESSES][TPR_WIRE_ADDRESS];
    uint64_t space;
    uint32_t process;
} tpr_wire_worker;

static size_t tpr_wire_put_worker(uint8_t *out, size_t size, const tpr_wire_worker *worker) {
    tpr_wire_writer w = tpr_wire_writer_of(out, size);
    tpr_wire_write_u64(&w, worker->nonce);
    tpr_wire_write_u32(&w, worker->rank);
    tpr_wire_write_text(&w, worker->name);
    tpr_wire_write_u32(&w, worker->address_count);
    for (uint32_t i = 0; i < worker->address_count; i++) tpr_wire_write_text(&w, worker->addresses[i]);
    tpr_wire_write_u64(&w, worker->space);
    tpr_wire_write_u32(&w, worker->process);
    return w.failed ? 0 : (size_t)(w.at - out);
}

TPR_COLD static bool tpr_wire_get_worker(const void *in, size_t size, tpr_wire_worker *out) {
    tpr_wire_reader r = tpr_wire_reader_of(in, size);
    memset(out, 0, sizeof *out);
    out->nonce = tpr_wire_read_u64(&r);
    out->rank = tpr_wire_read_u32(&r);
    tpr_wire_read_text(&r, out->name, sizeof out->name);
    out->address_count = tpr_wire_read_u32(&r);
    if (out->address_count > TPR_WIRE_ADDRESSES) r.failed = true;
    for (uint32_t i = 0; i < out->address_count && !r.failed; i++)
        tpr_wire_read_text(&r, out->addresses[i], sizeof out->addresses[i]);
    if (!r.failed && r.end - r.at >= 12) {
        out->space = tpr_wire_read_u64(&r);
        out->process = tpr_wire_read_u32(&r);
    }
    return !r.failed && tpr_base_name_fault(out->name, strlen(out->name), TPR_WIRE_NAME - 1) == NULL;
}

// ---- stores: what the ends of a tcp:// store say to each other
//
// Each end begins with a hello of 16 bytes: magic, major and minor version, status (of a server that refuses: why),
// zero. Frames follow: the size of what comes after it, then one layout for all types. A client's request has an id,
// which the server's one reply to it repeats; a cancelled request is not replied to.

enum {
    TPR_WIRE_STORE_MAGIC = 0x53525054,     // "TPRS"
    TPR_WIRE_STORE_MAJOR = 1, TPR_WIRE_STORE_MINOR = 0,
    TPR_WIRE_STORE_HELLO = 16,             // bytes
    TPR_WIRE_STORE_KEY = 255, TPR_WIRE_STORE_VALUE = 65536, TPR_WIRE_STORE_TEXT = 243,   // bytes at most
    TPR_WIRE_STORE_FIXED = 48,             // bytes of a frame without its four strings, size included
    TPR_WIRE_STORE_FRAME = 3 * 65536       // bytes at most, room for fields to come included
};
enum { TPR_WIRE_STORE_REQUEST = 1, TPR_WIRE_STORE_CANCEL = 2, TPR_WIRE_STORE_REPLY = 3 };
// Flags: of a request, not to wait, and that `expected` is there; of a reply, that `value` is.
enum { TPR_WIRE_STORE_NOWAIT = 1, TPR_WIRE_STORE_EXPECTED = 2, TPR_WIRE_STORE_PRESENT = 4 };

typedef struct tpr_wire_store_hello { uint16_t major, minor; uint32_t status; } tpr_wire_store_hello;

typedef struct tpr_wire_store_frame {
    uint8_t  type, kind, flags;            // kind: TPRPC_STORE_*, of a request
    uint32_t status;                       // these two of a reply
    int32_t  os_code;
    uint64_t id;
    int64_t  delta;
    tpr_base_bytes key, value, expected, text;
} tpr_wire_store_frame;

// Whether the first bytes of a hello, up to all of them, may begin one.
static bool tpr_wire_store_begins(const uint8_t *data, size_t size) {
    static const uint8_t magic[4] = {'T', 'P', 'R', 'S'};
    return size == 0 || memcmp(data, magic, size < 4 ? size : 4) == 0;
}

static bool tpr_wire_store_read_hello(const uint8_t *data, size_t size, tpr_wire_store_hello *out) {
    tpr_wire_reader r = tpr_wire_reader_of(data, size);
    uint32_t magic = tpr_wire_read_u32(&r);
    out->major = tpr_wire_read_u16(&r);
    out->minor = tpr_wire_read_u16(&r);
    out->status = tpr_wire_read_u32(&r);
    tpr_wire_read_u32(&r);
    return !r.failed && magic == (uint32_t)TPR_WIRE_STORE_MAGIC && out->status <= (uint32_t)TPRPC_ERROR_SYSTEM &&
           out->status != (uint32_t)TPRPC_PENDING;
}

static void tpr_wire_store_write_hello(uint8_t *out, tprpc_status status) {   // TPR_WIRE_STORE_HELLO bytes
    tpr_wire_writer w = tpr_wire_writer_of(out, TPR_WIRE_STORE_HELLO);
    tpr_wire_write_u32(&w, (uint32_t)TPR_WIRE_STORE_MAGIC);
    tpr_wire_write_u16(&w, (uint16_t)TPR_WIRE_STORE_MAJOR);
    tpr_wire_write_u16(&w, (uint16_t)TPR_WIRE_STORE_MINOR);
    tpr_wire_write_u32(&w, (uint32_t)status);
    tpr_wire_write_u32(&w, 0);
}

// Whether a whole frame stands at `data`. 1: yes, *length is its size; 0: not yet, *length is its size or 0; -1: it
// cannot.
static int tpr_wire_store_split(const uint8_t *data, size_t size, size_t *length) {
    *length = 0;
    if (size < 4) return 0;
    uint32_t rest = tpr_base_load_le32(data);
    if (rest > (uint32_t)TPR_WIRE_STORE_FRAME - 4 || rest < (uint32_t)TPR_WIRE_STORE_FIXED - 4) return -1;
    *length = 4 + (size_t)rest;
    return size >= *length;
}

// Reads a whole frame as split found it. False: it breaks the protocol.
static bool tpr_wire_store_read(const uint8_t *data, size_t size, tpr_wire_store_frame *out) {
    tpr_wire_reader r = tpr_wire_reader_of(data, size);
    tpr_wire_read_u32(&r);
    out->type = tpr_wire_read_u8(&r);
    out->kind = tpr_wire_read_u8(&r);
    out->flags = tpr_wire_read_u8(&r);
    tpr_wire_read_u8(&r);
    out->status = tpr_wire_read_u32(&r);
    out->os_code = (int32_t)tpr_wire_read_u32(&r);
    out->id = tpr_wire_read_u64(&r);
    out->delta = (int64_t)tpr_wire_read_u64(&r);
    out->key = tpr_wire_read_bytes(&r, TPR_WIRE_STORE_KEY);
    out->value = tpr_wire_read_bytes(&r, TPR_WIRE_STORE_VALUE);
    out->expected = tpr_wire_read_bytes(&r, TPR_WIRE_STORE_VALUE);
    out->text = tpr_wire_read_bytes(&r, TPR_WIRE_STORE_TEXT);
    if (r.failed) return false;
    switch (out->type) {
    case TPR_WIRE_STORE_REQUEST:
        return out->kind >= TPRPC_STORE_SET && out->kind <= TPRPC_STORE_DELETE &&
               !tpr_base_name_fault((const char *)out->key.data, out->key.size, TPR_WIRE_STORE_KEY);
    case TPR_WIRE_STORE_CANCEL: return true;
    case TPR_WIRE_STORE_REPLY:
        return out->status != (uint32_t)TPRPC_PENDING && out->status <= (uint32_t)TPRPC_ERROR_SYSTEM;
    default: return false;
    }
}

// The size of a frame as write makes it.
static size_t tpr_wire_store_size(const tpr_wire_store_frame *frame) {
    return (size_t)TPR_WIRE_STORE_FIXED + frame->key.size + frame->value.size + frame->expected.size + frame->text.size;
}

// Writes a frame into tpr_wire_store_size bytes.
static void tpr_wire_store_write(const tpr_wire_store_frame *frame, uint8_t *out) {
    size_t size = tpr_wire_store_size(frame);
    tpr_wire_writer w = tpr_wire_writer_of(out, size);
    tpr_wire_write_u32(&w, (uint32_t)size - 4);
    tpr_wire_write_u8(&w, frame->type);
    tpr_wire_write_u8(&w, frame->kind);
    tpr_wire_write_u8(&w, frame->flags);
    tpr_wire_write_u8(&w, 0);
    tpr_wire_write_u32(&w, frame->status);
    tpr_wire_write_u32(&w, (uint32_t)frame->os_code);
    tpr_wire_write_u64(&w, frame->id);
    tpr_wire_write_u64(&w, (uint64_t)frame->delta);
    tpr_wire_write_bytes(&w, frame->key.data, frame->key.size);
    tpr_wire_write_bytes(&w, frame->value.data, frame->value.size);
    tpr_wire_write_bytes(&w, frame->expected.data, frame->expected.size);
    tpr_wire_write_bytes(&w, frame->text.data, frame->text.size);
}

#ifndef TPRPC_NO_FILES
// ---- stores: the records of a file:// store
//
// The file is 8 bytes of magic and records: the hash of what follows it, whether the key is stored (1) or removed (2),
// the key's size, two zeros, the value's size, key, value.

enum { TPR_WIRE_RECORD_MAGIC = 8, TPR_WIRE_RECORD_FIXED = 16,   // bytes
       TPR_WIRE_RECORD_MOST = 16 + 255 + 65536 };
enum { TPR_WIRE_RECORD_SET = 1, TPR_WIRE_RECORD_DELETE = 2 };
static const uint8_t tpr_wire_record_magic[TPR_WIRE_RECORD_MAGIC] = {'t', 'p', 'r', 's', 't', 'o', 'r', '1'};

typedef struct tpr_wire_record { bool remove; tpr_base_bytes key, value; size_t size; } tpr_wire_record;

// Reads the record at `data`: 1: it is whole, of out->size bytes; 0: its end is missing; -1: it is none.
static int tpr_wire_record_read(const uint8_t *data, size_t size, tpr_wire_record *out) {
    tpr_wire_reader r = tpr_wire_reader_of(data, size);
    uint64_t hash = tpr_wire_read_u64(&r);
    uint8_t kind = tpr_wire_read_u8(&r);
    uint8_t key_size = tpr_wire_read_u8(&r);
    tpr_wire_read_u16(&r);
    uint32_t value_size = tpr_wire_read_u32(&r);
    if (r.failed) return 0;
    if ((kind != TPR_WIRE_RECORD_SET && kind != TPR_WIRE_RECORD_DELETE) || value_size > (uint32_t)TPR_WIRE_STORE_VALUE)
        return -1;
    out->remove = kind == TPR_WIRE_RECORD_DELETE;
    out->key = tpr_wire_read_raw(&r, key_size);
    out->value = tpr_wire_read_raw(&r, value_size);
    if (r.failed) return 0;
    out->size = (size_t)TPR_WIRE_RECORD_FIXED + key_size + value_size;
    if (tpr_base_hash(data + 8, out->size - 8) != hash) return -1;
    return tpr_base_name_fault((const char *)out->key.data, out->key.size, TPR_WIRE_STORE_KEY) ? -1 : 1;
}

// Writes a record into TPR_WIRE_RECORD_MOST bytes; a value without data removes the key. Returns its size.
static size_t tpr_wire_record_write(tpr_base_bytes key, tpr_base_bytes value, uint8_t *out) {
    size_t size = (size_t)TPR_WIRE_RECORD_FIXED + key.size + value.size;
    tpr_base_store_le32(out + 8, (value.data ? (uint32_t)TPR_WIRE_RECORD_SET : (uint32_t)TPR_WIRE_RECORD_DELETE) |
                                     (uint32_t)key.size << 8);
    tpr_base_store_le32(out + 12, (uint32_t)value.size);
    tpr_base_copy(out + TPR_WIRE_RECORD_FIXED, key.data, key.size);
    tpr_base_copy(out + TPR_WIRE_RECORD_FIXED + key.size, value.data, value.size);
    tpr_base_store_le64(out, tpr_base_hash(out + 8, size - 8));
    return size;
}
#endif

// >>timer -------------------------------------------------------------------------------------------------------------
// The timeout map: a hierarchical timing wheel of deferred work, 1 ms a tick, eleven wheels of 64 slots. Insert,
// cancel and expire are constant in time; nothing ticks while it is idle (bitmaps give the next slot in use). After
// Varghese and Lauck, "Hashed and Hierarchical Timing Wheels", 1987.
//
// Uses: atomic, os, base.
// Invariant: work in slot s of wheel w shares all base-64 digits above w with `now`, and its digit w is s, larger
// than now's. So the lowest slot in use of the lowest wheel in use is the next to open, and `now` may jump to it.

enum { TPR_TIMER_WHEELS = 11, TPR_TIMER_SLOTS = 64 };
// tprpc_work.state: idle; in a loop's inbox; in a wheel, whose slot is in the upper bits.
enum { TPR_TIMER_IDLE = 0, TPR_TIMER_POSTED = 1, TPR_TIMER_SET = 2 };

typedef struct tpr_timer_wheel {
    uint64_t    now, count;            // ms; timers set
    uint64_t    soonest_us;            // no slot opens before, so nothing is due before
    uint64_t    used[TPR_TIMER_WHEELS];
    tprpc_work *slots[TPR_TIMER_WHEELS][TPR_TIMER_SLOTS];
    tprpc_work *expired;               // taken out of the wheel and not run yet
} tpr_timer_wheel;

// The tick at which something due at due_us has certainly come due; ticks begin at 0 for times before the epoch.
static inline uint64_t tpr_timer_tick(int64_t due_us) {
    return due_us <= 0 ? 0 : ((uint64_t)due_us + 999) / 1000;
}

static void tpr_timer_init(tpr_timer_wheel *wheel, int64_t now_us) {
    memset(wheel, 0, sizeof *wheel);
    wheel->now = now_us <= 0 ? 0 : (uint64_t)now_us / 1000;
    wheel->soonest_us = UINT64_MAX;
}

static inline void tpr_timer_link(tpr_timer_wheel *wheel, tprpc_work *work, uint64_t due) {
    uint64_t differ, opens_us;
    uint32_t level, slot;
    if (due <= wheel->now) due = wheel->now + 1;   // it runs with the next tick
    differ = due ^ wheel->now;
    level = (uint32_t)(63 - __builtin_clzll((unsigned long long)differ)) / 6;
    slot = (uint32_t)(due >> (6 * level)) & (TPR_TIMER_SLOTS - 1);
    opens_us = (due >> (6 * level) << (6 * level)) * 1000;
    if (opens_us < wheel->soonest_us) wheel->soonest_us = opens_us;
    work->prev = NULL;
    work->next = wheel->slots[level][slot];
    if (work->next) work->next->prev = work;
    wheel->slots[level][slot] = work;
    wheel->used[level] |= UINT64_C(1) << slot;
    work->state = TPR_TIMER_SET | level << 8 | slot << 16;
}

// Sets idle work to run once the wheel's time has passed due_us.
static inline void tpr_timer_set(tpr_timer_wheel *wheel, tprpc_work *work, int64_t due_us) {
    work->due_us = due_us;
    wheel->count++;
    tpr_timer_link(wheel, work, tpr_timer_tick(due_us));
}

static inline bool tpr_timer_is_set(const tprpc_work *work) { return (work->state & 0xff) == TPR_TIMER_SET; }

// Takes work out before it ran. Does nothing when it is not set.
static inline void tpr_timer_cancel(tpr_timer_wheel *wheel, tprpc_work *work) {
    uint32_t level = (work->state >> 8) & 0xff, slot = work->state >> 16;
    tprpc_work **head;
    if (!tpr_timer_is_set(work)) return;
    head = level < TPR_TIMER_WHEELS ? &wheel->slots[level][slot] : &wheel->expired;
    if (work->prev) work->prev->next = work->next;
    else *head = work->next;
    if (work->next) work->next->prev = work->prev;
    if (!*head && level < TPR_TIMER_WHEELS) wheel->used[level] &= ~(UINT64_C(1) << slot);
    work->state = TPR_TIMER_IDLE;
    wheel->count--;
}

// The tick of the next slot to open: when the next timer is due, or a little before. UINT64_MAX: none.
static uint64_t tpr_timer_next_tick(const tpr_timer_wheel *wheel) {
    for (uint32_t level = 0; level < TPR_TIMER_WHEELS; level++) {
        if (!wheel->used[level]) continue;
        uint64_t slot = (uint64_t)__builtin_ctzll((unsigned long long)wheel->used[level]);
        uint32_t shift = 6 * level;
        uint64_t above = shift + 6 < 64 ? wheel->now >> (shift + 6) << (shift + 6) : 0;
        return above | slot << shift;
    }
    return UINT64_MAX;
}

// When the wheel wants tpr_timer_advance next, in us; INT64_MAX: never.
static int64_t tpr_timer_next_us(const tpr_timer_wheel *wheel) {
    uint64_t tick = wheel->count ? tpr_timer_next_tick(wheel) : UINT64_MAX;
    if (wheel->expired) return 0;
    return tick > (uint64_t)INT64_MAX / 1000 ? INT64_MAX : (int64_t)tick * 1000;
}

// Moves the wheel's time to now_us (a clock that went back does nothing) and puts what came due at the end of
// `expired`, the earlier tick first.
static void tpr_timer_advance(tpr_timer_wheel *wheel, int64_t now_us) {
    uint64_t to = now_us <= 0 ? 0 : (uint64_t)now_us / 1000, tick;
    tprpc_work *last = wheel->expired;
    while (last && last->next) last = last->next;   // none, where all was taken
    while (wheel->count && (tick = tpr_timer_next_tick(wheel)) <= to) {
        uint32_t level = 0, slot;
        tprpc_work *list;
        while (!wheel->used[level]) level++;
        slot = (uint32_t)__builtin_ctzll((unsigned long long)wheel->used[level]);
        list = wheel->slots[level][slot];
        wheel->slots[level][slot] = NULL;
        wheel->used[level] &= ~(UINT64_C(1) << slot);
        wheel->now = tick;
        while (list) {
            tprpc_work *work = list;
            list = work->next;
            if (tpr_timer_tick(work->due_us) > tick) {
                tpr_timer_link(wheel, work, tpr_timer_tick(work->due_us));
                continue;
            }
            work->prev = last;
            work->next = NULL;
            if (last) last->next = work;
            else wheel->expired = work;
            last = work;
            work->state = TPR_TIMER_SET | (uint32_t)TPR_TIMER_WHEELS << 8;
        }
    }
    if (to > wheel->now) wheel->now = to;
    tick = wheel->count ? tpr_timer_next_tick(wheel) : UINT64_MAX;
    wheel->soonest_us = tick > UINT64_MAX / 1000 ? UINT64_MAX : tick * 1000;
}

// Whether an advance to now_us may find something: one comparison, for a loop that turns ten million times a second.
static inline bool tpr_timer_may_be_due(const tpr_timer_wheel *wheel, int64_t now_us) {
    return now_us >= 0 && (uint64_t)now_us >= wheel->soonest_us;
}

// The next piece of work that came due, idle again, or NULL.
static inline tprpc_work *tpr_timer_take(tpr_timer_wheel *wheel) {
    tprpc_work *work = wheel->expired;
    if (work) tpr_timer_cancel(wheel, work);
    return work;
}

// >>process -----------------------------------------------------------------------------------------------------------
// Other processes of this host, watched for their end: a socket does not tell of it while a forked child holds it too.
//
// Uses: os, base.
// Invariant: all of a set happens under one lock, its loop's. A process in a set has a pidfd in the set's poller, and
// somebody who watches it; a set without processes has no poller.

enum { TPR_PROCESS_LOOK_US = 1000 };   // between looks at the poller while nobody sleeps on it

typedef struct tpr_process_set {
    tpr_base_memory *memory;
    tpr_base_map     by_pid;           // the last one of each number: that of one that has ended may be in use again
    uint32_t         count;
    int              poller, outer;    // poller: -1 or in `outer`, with `outer_user`
    void            *outer_user;
    bool             ringing;          // the sleeper was woken by it
    int64_t          looked_us;
} tpr_process_set;

typedef struct tpr_process {
    tpr_process_set *set;
    tpr_base_list    watches;
    int              fd;               // -1: it has ended, and its watches are being told
    int32_t          pid;
} tpr_process;

typedef struct tpr_process_watch {     // zeroed before the first use; does not move while it watches
    tpr_base_list node;
    tpr_process  *process;             // NULL: it watches none
    void (*ended)(struct tpr_process_watch *watch);   // it watches none any more
} tpr_process_watch;

enum { TPR_PROCESS_TAG = 0x636f7270 };   // "proc"

static void tpr_process_init(tpr_process_set *set, tpr_base_memory *memory, int outer, void *outer_user) {
    set->memory = set->by_pid.memory = memory;
    set->poller = -1;
    set->outer = outer;
    set->outer_user = outer_user;
}

static void tpr_process_fini(tpr_process_set *set) { tpr_base_map_clear(&set->by_pid); }

static bool tpr_process_open(tpr_process_set *set) {
    if (set->poller >= 0) return true;
    set->poller = tpr_os_poller();
    if (set->poller >= 0 && tpr_os_poller_set(set->outer, set->poller, TPR_OS_READABLE, set->outer_user, false) == 0)
        return true;
    tpr_os_close(set->poller);
    set->poller = -1;
    return false;
}

static void tpr_process_close(tpr_process_set *set) {
    if (set->count) return;
    tpr_os_poller_remove(set->outer, set->poller);
    tpr_os_close(set->poller);
    set->poller = -1;
}

TPR_COLD static void tpr_process_forget(tpr_process *process) {
    tpr_process_set *set = process->set;
    if (tpr_base_map_get(&set->by_pid, (uint64_t)process->pid) == process)
        tpr_base_map_remove(&set->by_pid, (uint64_t)process->pid);
    tpr_os_poller_remove(set->poller, process->fd);
    tpr_os_close(process->fd);
    process->fd = -1;
    set->count--;
    tpr_process_close(set);
}

TPR_COLD static void tpr_process_unwatch(tpr_process_watch *watch) {
    tpr_process *process = watch->process;
    if (!process) return;
    watch->process = NULL;
    tpr_base_list_remove(&watch->node);
    if (process->fd < 0 || !tpr_base_list_empty(&process->watches)) return;
    tpr_process_forget(process);
    tpr_base_free(process->set->memory, process, sizeof *process, (uint32_t)TPR_PROCESS_TAG);
}

// NULL: it cannot be watched; *gone: because there is none.
TPR_COLD static tpr_process *tpr_process_new(tpr_process_set *set, int32_t pid, bool *gone) {
    tpr_process *process = (tpr_process *)tpr_base_new(set->memory, sizeof *process, (uint32_t)TPR_PROCESS_TAG);
    if (!process) return NULL;
    process->set = set;
    process->pid = pid;
    process->fd = tpr_os_pidfd(pid);
    *gone = process->fd < 0 && errno == ESRCH;
    tpr_base_list_init(&process->watches);
    if (process->fd >= 0 && tpr_os_poller_set(set->poller, process->fd, TPR_OS_READABLE, process, false) == 0 &&
        tpr_base_map_put(&set->by_pid, (uint64_t)pid, process)) {
        set->count++;
        return process;
    }
    tpr_os_close(process->fd);
    tpr_base_free(set->memory, process, sizeof *process, (uint32_t)TPR_PROCESS_TAG);
    return NULL;
}

// Has `ended` called once, from tpr_process_look. Where it cannot be done the socket alone tells, and nothing happens;
// so too for this very process. A pid that was given to another process since the peer had it does no harm: the
// socket has ended then, or, held by a child, tells nothing in either case. False: there is no such process any more.
TPR_COLD static bool tpr_process_start(tpr_process_set *set, int32_t pid, tpr_process_watch *watch) {
    bool gone = false;
    if (watch->process || pid <= 0 || pid == tpr_os_pid() || !tpr_process_open(set)) return true;
    tpr_process *process = (tpr_process *)tpr_base_map_get(&set->by_pid, (uint64_t)pid);
    if (!process || tpr_os_readable(process->fd)) process = tpr_process_new(set, pid, &gone);   // readable: it has
    if (process) {                                                   // ended, and the number may be another's now
        watch->process = process;
        tpr_base_list_add(&process->watches, &watch->node);
    } else {
        tpr_process_close(set);
    }
    return !gone;
}

// Whether what is watched is alive at this moment. False also for what is not watched.
TPR_UNUSED static bool tpr_process_lives(const tpr_process_watch *watch) {
    return watch->process && watch->process->fd >= 0 && !tpr_os_readable(watch->process->fd);
}

static inline bool tpr_process_is_due(const tpr_process_set *set, int64_t now_us) {
    return set->count && (set->ringing || (uint64_t)(now_us - set->looked_us) >= TPR_PROCESS_LOOK_US);
}

// Tells of those that have ended; one event at a time, for what is told may end the watching of others.
TPR_COLD static bool tpr_process_look(tpr_process_set *set, int64_t now_us) {
    tpr_os_event event;
    bool did = false;
    set->ringing = false;
    set->looked_us = now_us;
    for (uint32_t n = set->count; n > 0 && set->poller >= 0; n--) {
        if (tpr_os_poller_wait(set->poller, &event, 1, 0) != 1) break;
        tpr_process *process = (tpr_process *)event.user;
        tpr_process_forget(process);
        while (!tpr_base_list_empty(&process->watches)) {
            tpr_process_watch *watch = TPR_CONTAINER(process->watches.next, tpr_process_watch, node);
            tpr_process_unwatch(watch);
            watch->ended(watch);
        }
        tpr_base_free(set->memory, process, sizeof *process, (uint32_t)TPR_PROCESS_TAG);
        did = true;
    }
    return did;
}

// >>loop --------------------------------------------------------------------------------------------------------------
// One event loop: who drives it, how it spins, sleeps and is woken, and what it runs: deferred work and timers under
// its lock, placements without the lock on whichever thread drives, callbacks without the lock on the callback
// thread.
//
// Uses: atomic, os, base, timer, process.
// Invariant: all state of a loop, and of everything that lives on it, is touched under its lock alone. At most one
// thread drives at a time and at most one sleeps in the poller; whoever stops driving leaves the sources armed for
// the sleeper, or wakes a follower. `asleep` is set before the last look for work, so that who posts after that look
// rings the bell.

enum {
    TPR_LOOP_SOURCES = 32,
    TPR_LOOP_TURNS = 64,               // of an unbudgeted poll
    TPR_LOOP_IDLE_TURNS = 16,          // between looks at the clock
    TPR_LOOP_QUICK_COPY = 16 << 10,    // bytes of bulk copied in one go while small messages are about (3 us),
    TPR_LOOP_QUICK_SEND = 32 << 10,    // or handed to a socket, or taken from one,
    TPR_LOOP_QUICK_US = 10000,         // which they are for so long after the last one
    TPR_LOOP_LET_PASS_US = 1000        // that others have to take the lock
};

typedef struct tpr_loop_env {         // what the loops of one context share
    tpr_base_memory memory;
    tpr_base_logger logger;
    int64_t (*clock_us)(void *user);   // NULL: the monotonic clock
    void    *user;
    int64_t  spin_us;
    uint32_t nesting;                  // waits inside callbacks
    bool     polled;
    uint32_t *fork_page;               // 1 in the process that created it; NULL where it cannot be told
} tpr_loop_env;

typedef struct tpr_loop_source {       // an instance of a backend, as the loop drives it
    void *instance;
    bool (*progress)(void *instance);
    bool (*arm)(void *instance, int64_t *deadline_us);
} tpr_loop_source;

typedef struct tpr_loop_task {         // something of a user's to run without the lock
    struct tpr_loop_task *next;
    void (*begin)(struct tpr_loop_task *task);    // before it, under the lock; NULL: none
    void (*run)(struct tpr_loop_task *task);      // without the lock
    void (*done)(struct tpr_loop_task *task);     // after it, under the lock; may free the task; NULL: none
    uint32_t *busy;                    // the owner's: callbacks of one owner never run in one another (NULL: no owner)
} tpr_loop_task;

typedef struct tpr_loop_queue { tpr_loop_task *head, **tail; } tpr_loop_queue;
typedef struct tpr_loop_work { tprpc_work *head, **tail; } tpr_loop_work;
typedef struct tpr_loop_follower {     // a thread that waits while another one drives or sleeps
    tpr_base_list node;
    uint32_t signal;                   // atomic, what it sleeps on
    bool     mine;                     // it is the callback thread
    bool   (*ready)(void *arg);        // what it waits for; NULL: for its turn to drive
    void    *arg;
} tpr_loop_follower;

typedef enum tpr_loop_whom { TPR_LOOP_ALL, TPR_LOOP_ONE, TPR_LOOP_MINE, TPR_LOOP_READY } tpr_loop_whom;

typedef struct tpr_loop {
    tpr_os_lock      lock;
    uint32_t         contenders, passed, giving;   // atomic: threads that wait for the lock; how often one that had
                                       // waited got it; that let others pass
    tprpc_work      *inbox;            // atomic: deferred, the newest first
    uint32_t         asleep, woken;    // atomic: someone sleeps or is armed; tprpc_wake was called
    uint32_t         deferring;        // atomic: threads in tpr_loop_defer_from
    tpr_loop_env    *env;
    tprpc_context   *context;
    uint32_t         index;
    bool             driving, sleeping, armed, sleeper_waits, stopping;   // armed: for a foreign loop
    int              poller, bell;
    uint32_t         source_count, depth;   // depth: callbacks on the stack
    uintptr_t        callback_thread;
    int64_t          now_us, sleep_until;
    int64_t          quick_us;         // when a small message was sent or taken in last
    uint64_t         idle_turns, polls;
    tpr_loop_queue   places, callbacks;
    tpr_loop_work    later;            // deferred under the lock
    tpr_base_list    followers;
    tpr_base_list    objects;          // tpr_loop_object, closed when the context is destroyed
    tpr_base_pool    pool;
    tpr_loop_source  sources[TPR_LOOP_SOURCES];
    tpr_process_set  processes;
    tpr_timer_wheel  wheel;
} tpr_loop;

typedef struct tpr_loop_object {       // something of a user's that lives on a loop until it is closed
    tpr_base_list node;
    void (*close)(struct tpr_loop_object *object);   // under the lock; it leaves the list once nothing of it is left
} tpr_loop_object;

static inline int64_t tpr_loop_clock(tpr_loop *loop) {
    tpr_loop_env *env = loop->env;
    loop->now_us = env->clock_us ? env->clock_us(env->user) : tpr_os_now_us();
    return loop->now_us;
}

static inline void tpr_loop_saw_small(tpr_loop *loop) { loop->quick_us = loop->now_us; }

// How many bytes of bulk may be moved in one go: a small message that comes meanwhile waits for them. At most `most`,
// or `quick` while such messages are about.
static inline size_t tpr_loop_chunk(const tpr_loop *loop, size_t most, size_t quick) {
    const bool about = loop->quick_us && loop->now_us - loop->quick_us < TPR_LOOP_QUICK_US;
    return about && most > quick ? quick : most;
}

TPR_COLD static void tpr_loop_contend(tpr_loop *loop) {
    TPR_ATOMIC_ADD(&loop->contenders, 1u);
    tpr_os_lock_await(&loop->lock);
    TPR_ATOMIC_SUB(&loop->contenders, 1u);
    TPR_ATOMIC_ADD(&loop->passed, 1u);
    if (TPR_ATOMIC_PEEK(&loop->giving)) tpr_os_futex_wake(&loop->passed, INT32_MAX);
}

static inline void tpr_loop_enter(tpr_loop *loop) {
    if (TPR_UNLIKELY(!tpr_os_trylock(&loop->lock))) tpr_loop_contend(loop);
}

static inline void tpr_loop_leave(tpr_loop *loop) {
    tpr_os_lock_give(&loop->lock);
    if (TPR_UNLIKELY(loop->env->logger.log != NULL)) tpr_base_log_flush(&loop->env->logger);
}

// Others have the lock before this thread has it again, unless they sleep so deeply that they do not come in time: a
// thread that has just been woken for the lock is slower than one that takes it again at once.
TPR_COLD static void tpr_loop_let_pass(tpr_loop *loop) {
    const uint32_t passed = TPR_ATOMIC_PEEK(&loop->passed);
    TPR_ATOMIC_ADD(&loop->giving, 1u);
    tpr_loop_leave(loop);
    for (int i = 0; i < 1000 && TPR_ATOMIC_PEEK(&loop->contenders); i++) tpr_atomic_pause();
    if (TPR_ATOMIC_PEEK(&loop->contenders)) tpr_os_futex_wait(&loop->passed, passed, TPR_LOOP_LET_PASS_US);
    TPR_ATOMIC_SUB(&loop->giving, 1u);
    tpr_loop_enter(loop);
}

// Lets others have the lock. Returns whether there were any.
static inline bool tpr_loop_give_way(tpr_loop *loop) {
    if (TPR_LIKELY(!TPR_ATOMIC_PEEK(&loop->contenders))) return false;
    tpr_loop_let_pass(loop);
    return true;
}

// ---- queues of tasks

static inline void tpr_loop_queue_init(tpr_loop_queue *queue) {
    queue->head = NULL;
    queue->tail = &queue->head;
}

static inline void tpr_loop_queue_put(tpr_loop_queue *queue, tpr_loop_task *task) {
    task->next = NULL;
    *queue->tail = task;
    queue->tail = &task->next;
}

// The first task whose owner has none running.
static tpr_loop_task *tpr_loop_queue_take(tpr_loop_queue *queue) {
    for (tpr_loop_task **at = &queue->head; *at; at = &(*at)->next) {
        tpr_loop_task *task = *at;
        if (task->busy && *task->busy) continue;
        *at = task->next;
        if (queue->tail == &task->next) queue->tail = at;
        return task;
    }
    return NULL;
}

// Whether a take would give a task.
static bool tpr_loop_queue_ready(const tpr_loop_queue *queue) {
    for (const tpr_loop_task *task = queue->head; task; task = task->next) if (!task->busy || !*task->busy) return true;
    return false;
}

// Wakes those followers whom it concerns, for each costs a switch. One: whoever leaves passes the role on.
TPR_COLD static void tpr_loop_wake_followers(tpr_loop *loop, tpr_loop_whom whom) {
    for (tpr_base_list *i = loop->followers.next; i != &loop->followers; i = i->next) {
        tpr_loop_follower *follower = TPR_CONTAINER(i, tpr_loop_follower, node);
        if (whom == TPR_LOOP_MINE && !follower->mine) continue;
        if (whom == TPR_LOOP_READY && !(follower->ready && follower->ready(follower->arg))) continue;
        if (!TPR_ATOMIC_PEEK(&follower->signal)) {
            TPR_ATOMIC_STORE(&follower->signal, 1u);
            tpr_os_futex_wake(&follower->signal, 1);
        }
        if (whom == TPR_LOOP_ONE) return;
    }
}

// Queues a callback for the callback thread, and wakes that where it sleeps.
static inline void tpr_loop_post(tpr_loop *loop, tpr_loop_task *task) {
    tpr_loop_queue_put(&loop->callbacks, task);
    if (TPR_UNLIKELY(TPR_ATOMIC_PEEK(&loop->asleep))) tpr_os_bell_ring(loop->bell);
    if (TPR_UNLIKELY(!tpr_base_list_empty(&loop->followers))) tpr_loop_wake_followers(loop, TPR_LOOP_MINE);
}

// Queues a placement, which whoever drives runs.
static inline void tpr_loop_post_place(tpr_loop *loop, tpr_loop_task *task) {
    tpr_loop_queue_put(&loop->places, task);
    if (TPR_UNLIKELY(!loop->driving && TPR_ATOMIC_PEEK(&loop->asleep))) tpr_os_bell_ring(loop->bell);
}

// Something that threads may be waiting for has happened: they look again.
static inline void tpr_loop_notify(tpr_loop *loop) {
    if (TPR_UNLIKELY(loop->sleeping && loop->sleeper_waits)) tpr_os_bell_ring(loop->bell);
    if (TPR_UNLIKELY(!tpr_base_list_empty(&loop->followers))) tpr_loop_wake_followers(loop, TPR_LOOP_READY);
}

// Whether the caller stands in a callback of this loop.
static inline bool tpr_loop_in_callback(tpr_loop *loop) {
    return loop->depth > 0 && loop->callback_thread == tpr_os_thread_id();
}

// ---- deferred work and timers

// Any thread, with or without the lock, a signal handler's excepted.
static void tpr_loop_defer(tpr_loop *loop, tprpc_work *work, bool timed) {
    work->state = (uint32_t)TPR_TIMER_POSTED | (timed ? 0x100u : 0u);
    tprpc_work *head = TPR_ATOMIC_PEEK(&loop->inbox);
    do work->next = head;
    while (!TPR_ATOMIC_CAS(&loop->inbox, &head, work));
    if (TPR_ATOMIC_LOAD_FULL(&loop->asleep)) tpr_os_bell_ring(loop->bell);
}

// The same for a thread that holds nothing of the context: what it deferred may run at once and be the last thing
// that the context waited for, so the loop stays until the thread is out of here.
static void tpr_loop_defer_from(tpr_loop *loop, tprpc_work *work, bool timed) {
    TPR_ATOMIC_ADD(&loop->deferring, 1u);
    tpr_loop_defer(loop, work, timed);
    TPR_ATOMIC_SUB(&loop->deferring, 1u);
}

// The same under the lock, where it costs no barrier; it cannot be taken back.
static inline void tpr_loop_later(tpr_loop *loop, tprpc_work *work) {
    work->state = TPR_TIMER_POSTED;
    work->next = NULL;
    *loop->later.tail = work;
    loop->later.tail = &work->next;
    if (TPR_UNLIKELY(TPR_ATOMIC_PEEK(&loop->asleep))) tpr_os_bell_ring(loop->bell);
}

// Sets a timer, under the lock.
static inline void tpr_loop_timer(tpr_loop *loop, tprpc_work *work, int64_t due_us) {
    tpr_timer_set(&loop->wheel, work, due_us);
    if (TPR_UNLIKELY(TPR_ATOMIC_PEEK(&loop->asleep)) && due_us < loop->sleep_until) tpr_os_bell_ring(loop->bell);
}

static void tpr_loop_drain(tpr_loop *loop) {
    tprpc_work *list = TPR_ATOMIC_SWAP(&loop->inbox, (tprpc_work *)NULL), *first = NULL;
    while (list) {   // oldest first
        tprpc_work *next = list->next;
        list->next = first;
        first = list;
        list = next;
    }
    while (first) {
        tprpc_work *work = first;
        bool timed = (work->state & 0x100u) != 0;
        first = work->next;
        work->state = TPR_TIMER_IDLE;
        if (timed) tpr_timer_set(&loop->wheel, work, work->due_us);
        else work->run(work);
    }
}

static void tpr_loop_run_later(tpr_loop *loop) {
    tprpc_work *first = loop->later.head;
    loop->later.head = NULL;
    loop->later.tail = &loop->later.head;
    while (first) {
        tprpc_work *work = first;
        first = work->next;
        work->state = TPR_TIMER_IDLE;
        work->run(work);
    }
}

// ---- driving

// One round over everything that may have work, under the lock. Returns whether anything was done.
static inline bool tpr_loop_turn(tpr_loop *loop) {
    bool did = false;
    if (TPR_ATOMIC_PEEK(&loop->inbox)) {
        tpr_loop_drain(loop);
        did = true;
    }
    if (loop->later.head) {
        tpr_loop_run_later(loop);
        did = true;
    }
    for (uint32_t i = 0; i < loop->source_count; i++) did |= loop->sources[i].progress(loop->sources[i].instance);
    if (TPR_UNLIKELY(tpr_process_is_due(&loop->processes, loop->now_us)))
        did |= tpr_process_look(&loop->processes, loop->now_us);
    if (TPR_UNLIKELY(tpr_timer_may_be_due(&loop->wheel, loop->now_us))) {
        tprpc_work *work;
        tpr_timer_advance(&loop->wheel, loop->now_us);
        while ((work = tpr_timer_take(&loop->wheel)) != NULL) {
            work->run(work);
            did = true;
        }
    }
    return did;
}

// Runs one task without the lock.
static inline void tpr_loop_run(tpr_loop *loop, tpr_loop_task *task) {
    uint32_t *busy = task->busy;
    void (*done)(tpr_loop_task *) = task->done;   // without one, `run` may give the task away
    if (busy) ++*busy;
    if (task->begin) task->begin(task);
    tpr_loop_leave(loop);
    task->run(task);
    tpr_loop_enter(loop);
    if (busy) --*busy;
    if (done) done(task);
}

static bool tpr_loop_run_places(tpr_loop *loop) {
    tpr_loop_task *task;
    bool did = false;
    while ((task = tpr_loop_queue_take(&loop->places)) != NULL) {
        tpr_loop_run(loop, task);
        did = true;
    }
    return did;
}

// Runs callbacks until `stop_us` (INT64_MAX: until none is left) or until ready. Callback thread only.
static bool tpr_loop_run_callbacks(tpr_loop *loop, int64_t stop_us, bool (*ready)(void *), void *arg) {
    tpr_loop_task *task;
    bool did = false;
    while (loop->callbacks.head && (task = tpr_loop_queue_take(&loop->callbacks)) != NULL) {
        loop->depth++;
        if (!tpr_base_list_empty(&loop->followers)) tpr_loop_wake_followers(loop, TPR_LOOP_ONE);   // to drive meanwhile
        tpr_loop_run(loop, task);
        loop->depth--;
        did = true;
        if ((ready && ready(arg)) || (stop_us != INT64_MAX && tpr_loop_clock(loop) >= stop_us)) break;
    }
    return did;
}

// Arms every source. False: one of them is busy, or there is other work for a thread that runs callbacks (`mine`) or
// not. tprpc_wake is for who polls, not for who waits (`waits`).
TPR_COLD static bool tpr_loop_quiet(tpr_loop *loop, bool mine, bool waits, int64_t *until_us) {
    if (TPR_ATOMIC_LOAD(&loop->inbox) || loop->later.head || loop->places.head) return false;
    if (mine && tpr_loop_queue_ready(&loop->callbacks)) return false;
    if (!waits && TPR_ATOMIC_LOAD(&loop->woken)) return false;
    int64_t timer = tpr_timer_next_us(&loop->wheel);
    if (timer < *until_us) *until_us = timer;
    for (uint32_t i = 0; i < loop->source_count; i++)
        if (loop->sources[i].arm && !loop->sources[i].arm(loop->sources[i].instance, until_us)) return false;
    return true;
}

// Sleeps in the poller until there is work or until_us (INT64_MAX: no limit). Where it may not, for a source is busy
// that yet did nothing, others get the lock for a moment. Who polls and follows a sleeper that waits is woken by it.
TPR_COLD static void tpr_loop_sleep(tpr_loop *loop, int64_t until_us, bool mine, bool waits) {
    tpr_os_event events[TPR_LOOP_SOURCES];
    bool slept = false;
    TPR_ATOMIC_STORE_FULL(&loop->asleep, 1u);
    loop->sleeping = true;
    loop->sleeper_waits = waits;
    if (waits && TPR_ATOMIC_LOAD(&loop->woken)) tpr_loop_wake_followers(loop, TPR_LOOP_ALL);
    if (tpr_loop_quiet(loop, mine, waits, &until_us)) {
        int64_t left = until_us == INT64_MAX ? -1 : until_us - tpr_loop_clock(loop);
        loop->sleep_until = until_us;
        if (until_us == INT64_MAX || left > 0) {
            tpr_loop_leave(loop);
            int n = tpr_os_poller_wait(loop->poller, events, TPR_LOOP_SOURCES, left);
            tpr_loop_enter(loop);
            for (int i = 0; i < n; i++) {
                if (!events[i].user) tpr_os_bell_clear(loop->bell);
                if (events[i].user == &loop->processes) loop->processes.ringing = true;
            }
            slept = true;
        }
    }
    loop->sleeping = false;
    TPR_ATOMIC_STORE_FULL(&loop->asleep, loop->armed ? 1u : 0u);
    if (!slept) tpr_loop_give_way(loop);
    tpr_loop_clock(loop);
}

// Waits, while another thread drives or sleeps, for its turn to drive, for callbacks that are its own to run, or until
// ready(arg).
TPR_COLD static void tpr_loop_follow(tpr_loop *loop, int64_t until_us, bool mine, bool (*ready)(void *), void *arg) {
    tpr_loop_follower self;
    int64_t left = until_us == INT64_MAX ? -1 : until_us - tpr_loop_clock(loop);
    if (until_us != INT64_MAX && left <= 0) return;
    self.signal = 0;
    self.mine = mine;
    self.ready = ready;
    self.arg = arg;
    tpr_base_list_add(&loop->followers, &self.node);
    tpr_loop_leave(loop);
    tpr_os_futex_wait(&self.signal, 0, left);
    tpr_loop_enter(loop);
    tpr_base_list_remove(&self.node);
    tpr_loop_clock(loop);
}

// Stops driving: what sleeps, or a foreign loop, relies on armed sources; otherwise a follower takes over.
static void tpr_loop_hand_on(tpr_loop *loop) {
    int64_t until = INT64_MAX;
    loop->driving = false;
    if (TPR_UNLIKELY(loop->sleeping || loop->armed)) {
        bool waits = loop->sleeping && loop->sleeper_waits;
        if (!tpr_loop_quiet(loop, true, waits, &until) || until < loop->sleep_until) tpr_os_bell_ring(loop->bell);
    } else if (TPR_UNLIKELY(!tpr_base_list_empty(&loop->followers))) {
        tpr_loop_wake_followers(loop, TPR_LOOP_ONE);
    }
}

// Drives the loop, or waits for who does, until ready(arg), at most until deadline_us (INT64_MAX: no limit). Under
// the lock, which is given up at times. Returns whether it is ready.
static bool tpr_loop_wait(tpr_loop *loop, bool (*ready)(void *), void *arg, int64_t deadline_us) {
    bool mine = loop->callback_thread == tpr_os_thread_id(), look = true, is_ready = false;
    int64_t spin_until = 0;
    uint32_t busy = 0;
    tpr_loop_clock(loop);
    while (!look || !(is_ready = ready(arg))) {
        bool did = false;
        look = true;
        if (!loop->driving) {
            loop->driving = true;
            did = tpr_loop_turn(loop);
            if (loop->places.head) did |= tpr_loop_run_places(loop);
            loop->driving = false;
            if (mine && loop->callbacks.head) did |= tpr_loop_run_callbacks(loop, INT64_MAX, ready, arg);
            if (did) {
                spin_until = 0;
                if (++busy % TPR_LOOP_TURNS != 0) continue;
                tpr_loop_give_way(loop);   // a loop that always has work sees its timers, its end and other threads too
                if (tpr_loop_clock(loop) >= deadline_us) break;
                continue;
            }
            if ((++loop->idle_turns % TPR_LOOP_IDLE_TURNS) != 0 && loop->env->spin_us > 0) {
                tpr_atomic_pause();
                look = tpr_loop_give_way(loop);   // otherwise nothing has changed
                continue;
            }
        }
        int64_t now = tpr_loop_clock(loop);
        if (now >= deadline_us) break;
        if (!spin_until) spin_until = now + loop->env->spin_us;
        if (now < spin_until && !loop->driving) {
            tpr_loop_give_way(loop);
            continue;
        }
        if (loop->driving || loop->sleeping) {
            if (loop->sleeping && !loop->driving) tpr_loop_hand_on(loop);
            tpr_loop_follow(loop, deadline_us, mine, ready, arg);
        } else {
            tpr_loop_sleep(loop, deadline_us, mine, true);
        }
        spin_until = 0;
    }
    if (!loop->driving) tpr_loop_hand_on(loop);
    return is_ready || ready(arg);
}

// tprpc_poll on one loop, under the lock: works until idle, or until stop_us; waits for the first work until
// deadline_us. Returns true when it stopped with work left.
static bool tpr_loop_poll(tpr_loop *loop, int64_t deadline_us, int64_t stop_us) {
    bool mine = loop->callback_thread == tpr_os_thread_id(), any = false;
    int64_t spin_until = 0;
    uint32_t turns = 0;
    if (mine && loop->armed) {
        loop->armed = false;
        loop->processes.ringing = true;
        TPR_ATOMIC_STORE_FULL(&loop->asleep, loop->sleeping ? 1u : 0u);
        tpr_os_bell_clear(loop->bell);
    }
    for (;;) {
        bool did = false;
        if (!loop->driving) {
            loop->driving = true;
            did = tpr_loop_turn(loop);
            if (loop->places.head) did |= tpr_loop_run_places(loop);
            loop->driving = false;
        }
        if (mine && loop->callbacks.head) did |= tpr_loop_run_callbacks(loop, stop_us, NULL, NULL);
        any |= did;
        if (did && (++turns >= TPR_LOOP_TURNS || (stop_us != INT64_MAX && tpr_loop_clock(loop) >= stop_us))) break;
        if (did) continue;
        turns = 0;
        if (any || TPR_ATOMIC_LOAD(&loop->woken) || loop->stopping) break;
        if (deadline_us == INT64_MIN) break;
        if ((++loop->idle_turns % TPR_LOOP_IDLE_TURNS) != 0 && loop->env->spin_us > 0) {
            tpr_atomic_pause();
            tpr_loop_give_way(loop);
            continue;
        }
        int64_t now = tpr_loop_clock(loop);
        if (now >= deadline_us) break;
        if (!spin_until) spin_until = now + loop->env->spin_us;
        if (now < spin_until) continue;
        if (loop->driving || loop->sleeping) {   // who sleeps needs the sources armed, which the turns above have ended
            if (loop->sleeping && !loop->driving) tpr_loop_hand_on(loop);
            tpr_loop_follow(loop, deadline_us, mine, NULL, NULL);
        } else {
            tpr_loop_sleep(loop, deadline_us, mine, false);
        }
        spin_until = INT64_MIN;        // it has slept: no more spinning, not even where the clock has gone back
    }
    // Who always has work, or finds some at the start of each poll, must see his timers and other threads.
    if (TPR_UNLIKELY(turns >= TPR_LOOP_TURNS || ++loop->polls % TPR_LOOP_IDLE_TURNS == 0)) tpr_loop_clock(loop);
    tpr_loop_give_way(loop);
    if (TPR_UNLIKELY(TPR_ATOMIC_PEEK(&loop->woken))) TPR_ATOMIC_STORE(&loop->woken, 0u);
    if (!loop->driving) tpr_loop_hand_on(loop);
    return turns > 0;
}

// ---- birth and death

TPR_COLD
static tprpc_status tpr_loop_init(tpr_loop *loop, tpr_loop_env *env, tprpc_context *context, uint32_t index,
                                  tprpc_error *error) {
    memset(loop, 0, sizeof *loop);
    loop->env = env;
    loop->context = context;
    loop->index = index;
    loop->callback_thread = tpr_os_thread_id();
    loop->pool.memory = &env->memory;
    tpr_loop_queue_init(&loop->places);
    tpr_loop_queue_init(&loop->callbacks);
    loop->later.tail = &loop->later.head;
    tpr_base_list_init(&loop->followers);
    tpr_base_list_init(&loop->objects);
    tpr_timer_init(&loop->wheel, tpr_loop_clock(loop));
    loop->bell = -1;
    loop->poller = tpr_os_poller();
    if (loop->poller >= 0) loop->bell = tpr_os_bell();
    if (loop->bell < 0 || tpr_os_poller_set(loop->poller, loop->bell, TPR_OS_READABLE, NULL, false) != 0) {
        int code = errno;
        tpr_os_close(loop->bell);
        tpr_os_close(loop->poller);
        return tpr_base_os_error(error, code, "creating", "an event loop");
    }
    tpr_process_init(&loop->processes, &env->memory, loop->poller, &loop->processes);
    return TPRPC_OK;
}

static tprpc_status tpr_loop_add_source(tpr_loop *loop, tpr_loop_source source, intptr_t handle, tprpc_error *error) {
    if (!source.progress) return TPRPC_OK;
    if (loop->source_count == TPR_LOOP_SOURCES)
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "more than %d backends in one context", TPR_LOOP_SOURCES);
    if (handle >= 0 && tpr_os_poller_set(loop->poller, (int)handle, TPR_OS_READABLE, loop, false) != 0)
        return tpr_base_os_error(error, errno, "watching", "a backend");
    loop->sources[loop->source_count++] = source;
    return TPRPC_OK;
}

static void tpr_loop_fini(tpr_loop *loop) {
    while (TPR_ATOMIC_LOAD(&loop->deferring)) tpr_atomic_pause();
    tpr_base_pool_clear(&loop->pool);
    tpr_process_fini(&loop->processes);
    tpr_os_close(loop->bell);
    tpr_os_close(loop->poller);
}

// >>context -----------------------------------------------------------------------------------------------------------
// A context: its loops and their threads, the user's hooks, the limits, the backends it was given.
//
// Uses: atomic, os, base, timer, loop.
// Invariant: what is here is set while the context is created and constant after, but for the objects on its loops.

enum { TPR_CONTEXT_BACKENDS = TPR_LOOP_SOURCES - 1, TPR_CONTEXT_LOOPS = 64, TPR_CONTEXT_LANES = 8 };

typedef struct tpr_context_backend {   // one backend of a context: viable, with an instance for each loop, or not, with
                                       // why
    const tprpc_backend *backend;
    int32_t     priority;              // as the user's list orders it, else its own
    bool        viable, left_out;      // left_out: of the user's list, and so of pipes; a store may use it all the same
    uint32_t    opened;                // instances, of loops 0 and up
    void       *instances[TPR_CONTEXT_LOOPS];
    tprpc_host *hosts;                 // one for each loop
    char        why[160];
} tpr_context_backend;

typedef struct tpr_context_thread {
    tpr_loop *loop;
    char name[24];
#ifndef TPRPC_NO_THREADS
    tpr_os_thread thread;
#endif
} tpr_context_thread;

struct tprpc_context {
    tpr_loop_env  env;
    tprpc_limits  limits;
    bool        (*submit)(void (*run)(void *), void *arg, void *user);
    void        (*thread_begin)(const char *name, void *user);
    void        (*thread_end)(const char *name, void *user);
    void         *user;
    uint32_t      loop_count, thread_count, backend_count, next_loop;   // next_loop is atomic
    uint32_t      agents, pipes;       // atomic: alive
    uint32_t      lanes;               // of a pipe, at most
    bool          ordered_channels;    // by the user
    tpr_loop     *loops;
    tpr_context_thread *threads;
    tpr_context_backend backends[TPR_CONTEXT_BACKENDS];
    uint8_t       nonce[16];           // tells this context from every other
    uint64_t      process_space;
};

enum { TPR_CONTEXT_TAG = 0x20787463 };   // "ctx "

// The instance, on another loop of its context, of the backend whose instance was given `host`.
static void *tpr_context_instance(const tprpc_host *host, uint32_t loop) {
    tprpc_context *ctx = host->context;
    uint32_t i = 0;
    while (ctx->backends[i].hosts != host - host->loop) i++;
    return ctx->backends[i].instances[loop];
}

// Whether a public function may use the context: not after a fork.
static inline bool tpr_context_usable(const tprpc_context *ctx) {
    return ctx && (!ctx->env.fork_page || TPR_LIKELY(*ctx->env.fork_page == 1));
}

// A loop for a new listener or connection: each in turn.
static tpr_loop *tpr_context_next_loop(tprpc_context *ctx) {
    return &ctx->loops[TPR_ATOMIC_ADD(&ctx->next_loop, 1u) % ctx->loop_count];
}

// Whether the calling thread stands in a callback of any loop of the context.
static bool tpr_context_in_callback(tprpc_context *ctx) {
    bool inside = false;
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        tpr_loop_enter(&ctx->loops[i]);
        inside |= tpr_loop_in_callback(&ctx->loops[i]);
        tpr_loop_leave(&ctx->loops[i]);
    }
    return inside;
}

static void *tpr_context_alloc(tprpc_context *ctx, size_t size) {
    return tpr_base_new(&ctx->env.memory, size, (uint32_t)TPR_CONTEXT_TAG);
}

static void tpr_context_free(tprpc_context *ctx, void *ptr, size_t size) {
    tpr_base_free(&ctx->env.memory, ptr, size, (uint32_t)TPR_CONTEXT_TAG);
}

// The default of a time given in ms or us, 0 standing for it.
static int64_t tpr_context_time(int64_t given, int64_t otherwise) {
    return given == 0 ? otherwise : given == TPRPC_NOW ? 0 : given;
}

// When `given` from now ends, on the context's clock: INT64_MAX for no limit.
static int64_t tpr_context_deadline(int64_t now_us, int64_t given_ms) {
    if (given_ms < 0 || given_ms > (INT64_MAX - now_us) / 1000 - 1) return INT64_MAX;
    return now_us + given_ms * 1000;
}

static void tpr_context_limits(tprpc_limits *limits) {
    static const tprpc_limits defaults = {UINT64_C(16) << 30, UINT64_C(1) << 20, UINT64_C(4) << 30, UINT64_C(256) << 20,
                                          4096, 16384, 4194304, 1024, 16};
    if (!limits->message_bytes) limits->message_bytes = defaults.message_bytes;
    if (!limits->metadata_bytes) limits->metadata_bytes = defaults.metadata_bytes;
    if (!limits->memory_bytes) limits->memory_bytes = defaults.memory_bytes;
    if (!limits->inflight_bytes) limits->inflight_bytes = defaults.inflight_bytes;
    if (!limits->tensors) limits->tensors = defaults.tensors;
    if (!limits->pipes) limits->pipes = defaults.pipes;
    if (!limits->pending_calls) limits->pending_calls = defaults.pending_calls;
    if (!limits->handshakes) limits->handshakes = defaults.handshakes;
    if (!limits->nesting) limits->nesting = defaults.nesting;
}

#ifndef TPRPC_NO_THREADS
TPR_COLD static void tpr_context_thread_main(void *arg) {
    tpr_context_thread *self = (tpr_context_thread *)arg;
    tpr_loop *loop = self->loop;
    tprpc_context *ctx = loop->context;
    if (ctx->thread_begin) ctx->thread_begin(self->name, ctx->user);
    tpr_loop_enter(loop);
    TPR_ATOMIC_STORE(&loop->callback_thread, tpr_os_thread_id());   // threads of other loops look without the lock
    while (!loop->stopping) tpr_loop_poll(loop, INT64_MAX, INT64_MAX);
    tpr_loop_leave(loop);
    if (ctx->thread_end) ctx->thread_end(self->name, ctx->user);
}
#endif

static tprpc_status tpr_context_start_threads(tprpc_context *ctx, tprpc_error *error) {
#ifndef TPRPC_NO_THREADS
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        tpr_context_thread *thread = &ctx->threads[i];
        thread->loop = &ctx->loops[i];
        snprintf(thread->name, sizeof thread->name, "tprpc-%u", (unsigned)i);
        ctx->loops[i].callback_thread = 0;
        if (tpr_os_thread_start(&thread->thread, tpr_context_thread_main, thread) != 0)
            return tpr_base_os_error(error, errno, "starting", "an I/O thread");
        ctx->thread_count++;
    }
    return TPRPC_OK;
#else
    (void)ctx;
    return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "threads: built with TPRPC_NO_THREADS");
#endif
}

// Ends the threads; from here on the calling thread runs what callbacks are left.
static void tpr_context_stop_threads(tprpc_context *ctx) {
    for (uint32_t i = 0; i < ctx->thread_count; i++) {
        tpr_loop *loop = &ctx->loops[i];
        tpr_loop_enter(loop);
        loop->stopping = true;
        tpr_os_bell_ring(loop->bell);
        tpr_loop_wake_followers(loop, TPR_LOOP_ALL);
        tpr_loop_leave(loop);
#ifndef TPRPC_NO_THREADS
        tpr_os_thread_join(&ctx->threads[i].thread);
#endif
        tpr_os_bell_clear(loop->bell);
    }
    ctx->thread_count = 0;
    for (uint32_t i = 0; i < ctx->loop_count; i++) ctx->loops[i].callback_thread = tpr_os_thread_id();
}

static inline bool tpr_context_can_defer(const tprpc_context *ctx, const tprpc_work *work) {
    return ctx && work && work->run && work->loop < ctx->loop_count;
}

// ---- public

TPRPC_API bool tprpc_poll(tprpc_context *ctx, int64_t wait_us, int64_t budget_us) {
    bool left = false;
    TPRPC_ASSERT(ctx);
    if (!tpr_context_usable(ctx)) return false;
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        tpr_loop *loop = &ctx->loops[i];
        int64_t deadline = wait_us == TPRPC_FOREVER ? INT64_MAX : INT64_MIN, stop = INT64_MAX;
        tpr_loop_enter(loop);
        if (wait_us != TPRPC_FOREVER || budget_us > 0 || loop->wheel.count) {
            int64_t now = tpr_loop_clock(loop);
            if (wait_us > 0) deadline = wait_us < INT64_MAX - now ? now + wait_us : INT64_MAX;
            if (budget_us > 0) stop = budget_us < INT64_MAX - now ? now + budget_us : INT64_MAX;
        }
        left |= tpr_loop_poll(loop, ctx->loop_count > 1 ? INT64_MIN : deadline, stop);
        tpr_loop_leave(loop);
    }
    return left;
}

TPRPC_API void tprpc_wake(tprpc_context *ctx) {
    TPRPC_ASSERT(ctx);
    if (!tpr_context_usable(ctx)) return;
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        TPR_ATOMIC_STORE_FULL(&ctx->loops[i].woken, 1u);
        if (TPR_ATOMIC_LOAD_FULL(&ctx->loops[i].asleep)) tpr_os_bell_ring(ctx->loops[i].bell);
    }
}

TPRPC_API void tprpc_context_bind_thread(tprpc_context *ctx) {
    TPRPC_ASSERT(ctx);
    if (!tpr_context_usable(ctx) || !ctx->env.polled) return;
    tpr_loop_enter(&ctx->loops[0]);
    ctx->loops[0].callback_thread = tpr_os_thread_id();
    tpr_loop_leave(&ctx->loops[0]);
}

TPRPC_API intptr_t tprpc_context_handle(tprpc_context *ctx) {
    TPRPC_ASSERT(ctx);
    return tpr_context_usable(ctx) ? ctx->loops[0].poller : -1;
}

TPR_COLD
TPRPC_API bool tprpc_context_arm(tprpc_context *ctx, int64_t *deadline_us) {
    int64_t until = INT64_MAX;
    TPRPC_ASSERT(ctx);
    if (deadline_us) *deadline_us = TPRPC_FOREVER;
    if (!tpr_context_usable(ctx) || !ctx->env.polled) return true;
    tpr_loop *loop = &ctx->loops[0];
    tpr_loop_enter(loop);
    TPR_ATOMIC_STORE_FULL(&loop->asleep, 1u);
    loop->armed = tpr_loop_quiet(loop, true, false, &until);
    loop->sleep_until = until;
    if (loop->armed && until != INT64_MAX) {
        int64_t left = until - tpr_loop_clock(loop);
        if (deadline_us) *deadline_us = left > 0 ? left : 0;
        if (left <= 0) loop->armed = false;
    }
    if (!loop->armed) TPR_ATOMIC_STORE_FULL(&loop->asleep, loop->sleeping ? 1u : 0u);
    bool armed = loop->armed;
    tpr_loop_leave(loop);
    return armed;
}

TPRPC_API void tprpc_defer(tprpc_context *ctx, tprpc_work *work) {
    TPRPC_ASSERT(tpr_context_can_defer(ctx, work));
    if (!tpr_context_can_defer(ctx, work)) return;
    tpr_loop_defer_from(&ctx->loops[work->loop], work, false);
}

TPRPC_API void tprpc_defer_at(tprpc_context *ctx, tprpc_work *work, int64_t due_us) {
    TPRPC_ASSERT(tpr_context_can_defer(ctx, work));
    if (!tpr_context_can_defer(ctx, work)) return;
    work->due_us = due_us;
    tpr_loop_defer_from(&ctx->loops[work->loop], work, true);
}

TPRPC_API int64_t tprpc_now_us(tprpc_context *ctx) {
    TPRPC_ASSERT(ctx);
    if (!ctx) return 0;
    return ctx->env.clock_us ? ctx->env.clock_us(ctx->env.user) : tpr_os_now_us();
}

TPRPC_API void *tprpc_alloc(tprpc_context *ctx, size_t size, size_t align, uint32_t tag) {
    bool fits = align > 0 && align <= 4096 && !(align & (align - 1));
    TPRPC_ASSERT(ctx && fits);
    return ctx && fits ? tpr_base_alloc(&ctx->env.memory, size, align, tag) : NULL;
}

TPRPC_API void tprpc_free(tprpc_context *ctx, void *ptr, size_t size, uint32_t tag) {
    TPRPC_ASSERT(ctx);
    if (ctx) tpr_base_free(&ctx->env.memory, ptr, size, tag);
}

TPR_COLD
TPRPC_API void tprpc_log_text(tprpc_context *ctx, int32_t level, const char *section, const char *text) {
    TPRPC_ASSERT(ctx && level >= TPRPC_LOG_PANIC && section && text);
    if (!ctx || level < TPRPC_LOG_PANIC || !section || !text) return;
    TPR_LOG(&ctx->env.logger, level, section, "", "%s", text);
}

// >>transport ---------------------------------------------------------------------------------------------------------
// What the transports share; the interface itself, tprpc_transport_table, stands in the public part.
//
// Uses: atomic, os, base, timer, loop, context.
// Invariant: a transport is reached through its table alone, by whoever holds the lock of the loop its instance is on.

// Splits "name://rest": returns rest, and puts the name into `name` of 16 bytes. NULL: it is no address.
static const char *tpr_transport_split(const char *address, char *name) {
    const char *at = address ? strstr(address, "://") : NULL;
    if (!at || at == address || at - address > 15) return NULL;
    memcpy(name, address, (size_t)(at - address));
    name[at - address] = 0;
    return at + 3;
}

#ifndef TPRPC_NO_TCP
// >>tcp ---------------------------------------------------------------------------------------------------------------
// The transport over TCP, IPv4 and IPv6: reaches everything, beats nothing.
//
// While a thread spins, the sockets that had bytes lately (the hot set) are read without asking the poller, which is
// looked at now and then for the others; who sleeps does so on the poller, in which all sockets are then. Interest is
// changed lazily, when the poller reports what nobody wants, so that neither small messages nor a stream pay for it.
//
// Uses: atomic, os, base, timer, loop, context.
// Invariant: a connection has a buffer exactly while that holds bytes which its owner has not consumed. A socket in
// `broken` has a cause, is out of the poller, and gets its one LOST at the end of the next progress. A closed socket's
// memory stays until no function of this section is walking over sockets.

enum {
    TPR_TCP_BUFFER = 64 << 10,         // bytes received ahead of the owner, at most,
    TPR_TCP_AHEAD = 512,               // and behind a piece received in place, for they are copied once more
    TPR_TCP_LARGE = 16 << 10,          // which such a piece has at least
    TPR_TCP_CHUNK = 256 << 10,         // bytes that one connection moves before it is the next one's turn
    TPR_TCP_HOT = 16,                  // connections that are read without asking the poller, 0.2 us each
    TPR_TCP_HOT_TRIES = 4000,          // in vain, until one is hot no more
    TPR_TCP_HOT_FINDS = 256,           // without a sleep, until one leaves the poller: being in it costs senders 7 % of
                                       // a round trip of 64 bytes (2-core x86-64 VM, loopback)
    TPR_TCP_LOOK_CALLS = 256,          // the poller is looked at after so many calls of progress,
    TPR_TCP_LOOK_US = 10,              // or after that time,
    TPR_TCP_EAGER = 1000,              // or for so many calls at each, when a stream has been waiting for its socket
    TPR_TCP_EVENTS = 32,
    TPR_TCP_ACCEPTS = 16,              // of one listener in one progress
    TPR_TCP_RETRY_US = 100000,         // after an accept failed
    TPR_TCP_KEEPALIVE_S = 30,          // a peer that is silent for so long is dead
    TPR_TCP_CHECK_US = 5000000,        // between looks at connections that wait for an ACK
    TPR_TCP_EOF = -1, TPR_TCP_SILENT = -2   // causes that are no errno
};

typedef struct tpr_tcp_socket {        // what the poller knows: a connection or a listener
    tpr_base_list   node;              // in sockets, broken or closed
    struct tpr_tcp *tcp;
    int             fd;
    uint32_t        interest;          // as the poller was told, or will be
    bool            listening, closed;
    bool            outside;           // of the poller for now
} tpr_tcp_socket;

typedef struct tpr_tcp_conn {
    tpr_tcp_socket    socket;
    tprpc_conn_owner *owner;
    uint8_t          *buffer;          // TPR_TCP_BUFFER bytes, of which at..end are received and not consumed; or NULL
    uint32_t          at, end, ahead;  // ahead: how many the next receive may take into it
    uint32_t          hot;             // place in the hot set + 1; 0: not in it
    uint32_t          idle, busy;      // tries in a row that found nothing; finds since the last arm
    bool              connecting;
    bool              drained;         // the last receive got all there was: no more until progress says so
    bool              direct;          // the owner waits for more bytes than came, to receive them in place
    bool              ended;           // nothing more comes out of the socket
    bool              want_send;       // a SEND event is owed
    bool              unproven;        // has sent since everything was last seen acknowledged
    int               cause;           // why it is over: an errno or TPR_TCP_*; 0 while it is not
    int64_t           waiting_us;      // since when each look found it waiting for an ACK; 0: the last did not
    char              peer[64];
} tpr_tcp_conn;

typedef struct tpr_tcp_listener {
    tpr_tcp_socket      socket;
    tprpc_listen_owner *owner;
    tprpc_work          retry;
    bool                warned;
} tpr_tcp_listener;

typedef struct tpr_tcp {
    tpr_loop     *loop;
    int           poller;
    bool          walking, armed;      // armed: since the last progress
    uint32_t      calls, eager;        // of progress since the last look; looks to come at each call
    uint32_t      hot_count, hot_first, first;   // who is first among the hot and among the poller's, in turn
    int64_t       looked_us;
    int64_t       quota;               // bytes that may be received before it is the next one's turn
    int64_t       silence_us;          // TPR_TCP_KEEPALIVE_S, but in tests
    uint64_t      received;            // bytes, ever
    tpr_tcp_conn *hot[TPR_TCP_HOT];
    tpr_base_list sockets, broken, closed;
    tprpc_work    check;
} tpr_tcp;

// ---- sockets

static void tpr_tcp_event(tpr_tcp_conn *conn, uint32_t events, const tprpc_error *error) {
    if (!conn->socket.closed && conn->owner) conn->owner->event(conn->owner, events, error);
}

static void tpr_tcp_cool(tpr_tcp_conn *conn) {
    tpr_tcp *tcp = conn->socket.tcp;
    if (!conn->hot) return;
    tpr_tcp_conn *last = tcp->hot[--tcp->hot_count];
    tcp->hot[conn->hot - 1] = last;
    last->hot = conn->hot;
    conn->hot = 0;
}

// The connection is over. Its owner hears of it from progress, which a sleeper is woken for.
TPR_COLD static void tpr_tcp_break(tpr_tcp_conn *conn, int cause) {
    tpr_tcp *tcp = conn->socket.tcp;
    if (conn->cause) return;
    conn->cause = cause;
    tpr_os_poller_remove(tcp->poller, conn->socket.fd);
    tpr_tcp_cool(conn);
    tpr_base_list_remove(&conn->socket.node);
    tpr_base_list_add(&tcp->broken, &conn->socket.node);
    if (TPR_ATOMIC_PEEK(&tcp->loop->asleep)) tpr_os_bell_ring(tcp->loop->bell);
}

static bool tpr_tcp_watch(tpr_tcp_socket *socket, uint32_t interest) {
    if (socket->interest == interest) return true;
    if (!socket->outside && tpr_os_poller_set(socket->tcp->poller, socket->fd, interest, socket, true) != 0)
        return false;
    socket->interest = interest;
    return true;
}

static void tpr_tcp_conn_watch(tpr_tcp_conn *conn, uint32_t interest) {
    if (!conn->cause && !tpr_tcp_watch(&conn->socket, interest)) tpr_tcp_break(conn, errno);
}

// Back into the poller: trying alone would not do any more.
static void tpr_tcp_inside(tpr_tcp_conn *conn) {
    tpr_tcp_socket *socket = &conn->socket;
    conn->busy = 0;
    if (TPR_LIKELY(!socket->outside) || conn->cause) return;
    socket->outside = false;
    if (tpr_os_poller_set(socket->tcp->poller, socket->fd, socket->interest, socket, false) != 0)
        tpr_tcp_break(conn, errno);
}

// Bytes have come: it is likely that more will.
static void tpr_tcp_heat(tpr_tcp_conn *conn) {
    tpr_tcp *tcp = conn->socket.tcp;
    conn->idle = 0;
    if (TPR_LIKELY(conn->hot != 0)) {
        if (conn->direct || conn->want_send || ++conn->busy != TPR_TCP_HOT_FINDS) return;
        tpr_os_poller_remove(tcp->poller, conn->socket.fd);
        conn->socket.outside = true;
        return;
    }
    if (tcp->hot_count == TPR_TCP_HOT) {
        tpr_tcp_conn *other = tcp->hot[tcp->hot_first % TPR_TCP_HOT];
        if (other->idle < TPR_TCP_LOOK_CALLS) return;
        tpr_tcp_cool(other);
        tpr_tcp_inside(other);
    }
    tcp->hot[tcp->hot_count++] = conn;
    conn->hot = tcp->hot_count;
}

static size_t tpr_tcp_socket_size(const tpr_tcp_socket *socket) {
    return socket->listening ? sizeof(tpr_tcp_listener) : sizeof(tpr_tcp_conn);
}

static tpr_tcp_socket *tpr_tcp_socket_new(tpr_tcp *tcp, bool listening) {
    size_t size = listening ? sizeof(tpr_tcp_listener) : sizeof(tpr_tcp_conn);
    tpr_tcp_socket *socket = (tpr_tcp_socket *)tpr_base_pool_alloc(&tcp->loop->pool, size);
    if (!socket) return NULL;
    memset(socket, 0, size);
    socket->tcp = tcp;
    socket->listening = listening;
    socket->fd = -1;
    tpr_base_list_init(&socket->node);
    return socket;
}

// Takes an open descriptor over and puts it into the poller. False: neither was done.
static bool tpr_tcp_socket_add(tpr_tcp_socket *socket, int fd, uint32_t interest) {
    if (tpr_os_poller_set(socket->tcp->poller, fd, interest, socket, false) != 0) return false;
    socket->fd = fd;
    socket->interest = interest;
    tpr_base_list_add(&socket->tcp->sockets, &socket->node);
    return true;
}

static void tpr_tcp_sweep(tpr_tcp *tcp) {
    while (!tpr_base_list_empty(&tcp->closed)) {
        tpr_tcp_socket *socket = TPR_CONTAINER(tcp->closed.next, tpr_tcp_socket, node);
        tpr_base_list_remove(&socket->node);
        tpr_base_pool_free(&tcp->loop->pool, socket, tpr_tcp_socket_size(socket));
    }
}

// Taken out of the poller by name: a descriptor that a forked child holds stays in it otherwise.
TPR_COLD static void tpr_tcp_socket_close(tpr_tcp_socket *socket) {
    tpr_tcp *tcp = socket->tcp;
    socket->closed = true;
    tpr_os_poller_remove(tcp->poller, socket->fd);
    if (socket->listening) tpr_os_close(socket->fd);
    else tpr_os_tcp_close(socket->fd);
    tpr_base_list_remove(&socket->node);
    tpr_base_list_add(&tcp->closed, &socket->node);
    if (!tcp->walking) tpr_tcp_sweep(tcp);
}

// ---- addresses

// Splits and looks up "host:port". Blocks when host is a name.
TPR_COLD static tprpc_status tpr_tcp_parse(const char *address, tpr_os_address *out, tprpc_error *error) {
    const char *host_at = address, *colon = strrchr(address, ':'), *fault = NULL;
    char host[256];
    size_t length = colon ? (size_t)(colon - address) : 0, digits = colon ? strspn(colon + 1, "0123456789") : 0;
    unsigned long port = digits > 0 && digits < 6 ? strtoul(colon + 1, NULL, 10) : 65536;
    if (!colon || strchr(colon, ']')) fault = "it has no port";
    else if (digits == 0 || colon[1 + digits] || port > 65535) fault = "its port is not a number from 0 to 65535";
    else if (address[0] == '[' && (length < 2 || address[length - 1] != ']')) fault = "its brackets do not match";
    else if (address[0] != '[' && memchr(address, ':', length)) fault = "an IPv6 address needs brackets, as [::1]:80";
    else if (length >= sizeof host) fault = "its host is too long";
    if (fault) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tcp address \"%.100s\": %s", address, fault);
    if (address[0] == '[') {
        host_at++;
        length -= 2;
    }
    if (length == 1 && host_at[0] == '*') length = 0;
    tpr_base_copy(host, host_at, length);
    host[length] = 0;
    fault = tpr_os_resolve(host, (uint16_t)port, out);
    if (fault) return tprpc_error_set(error, TPRPC_ERROR_UNREACHABLE, 0, "tcp address \"%.100s\": %s", address, fault);
    return TPRPC_OK;
}

static size_t tpr_tcp_domain(void *instance, uint8_t *out, size_t capacity) {
    (void)instance;
    (void)out;
    (void)capacity;
    return 0;
}

static bool tpr_tcp_reaches(void *instance, const uint8_t *domain, size_t size) {
    (void)instance;
    (void)domain;
    (void)size;
    return true;
}

static bool tpr_tcp_public_address(void *instance, const char *address) {
    tpr_os_address at;
    (void)instance;
    if (!address[0]) return false;
    tprpc_status status = tpr_tcp_parse(address, &at, NULL);
    if (status == TPRPC_ERROR_INVALID) return false;   // listen and connect say what is wrong with it
    return status != TPRPC_OK || !tpr_os_is_loopback(&at);
}

TPR_COLD static size_t tpr_tcp_address(void *listener, char *out, size_t capacity) {
    const tpr_tcp_listener *self = (const tpr_tcp_listener *)listener;
    tpr_os_address at;
    if (capacity) out[0] = 0;
    if (tpr_os_local_address(self->socket.fd, &at) == 0) tpr_os_address_text(&at, true, out, capacity);
    return strlen(out);
}

static size_t tpr_tcp_peer(void *conn, char *out, size_t capacity) {
    int n = snprintf(out, capacity, "%s", ((const tpr_tcp_conn *)conn)->peer);
    return n < 0 ? 0 : (size_t)n;
}

TPR_COLD static tprpc_status tpr_tcp_check_peer(void *conn, tprpc_error *error) {
    const tpr_tcp_conn *self = (const tpr_tcp_conn *)conn;
    tpr_os_address here, there;
    uint32_t user = 0, mine = tpr_os_user();
    bool told = tpr_os_peer_address(self->socket.fd, &there) == 0;
    if (told && !tpr_os_is_loopback(&there)) return TPRPC_OK;
    told = told && tpr_os_local_address(self->socket.fd, &here) == 0 && tpr_os_tcp_owner(&there, &here, &user) == 0;
    if (!told && (errno == ENOENT || errno == ENOTCONN))   // it was there, for it has said something
        return tprpc_error_set(error, TPRPC_ERROR_PEER, 0, "tcp %s closed it while it was made", self->peer);
    if (!told)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, errno, "tcp %s: whose socket that is cannot be told: %s",
                               self->peer, strerror(errno));
    if (user == mine) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_DENIED, 0, "tcp %s belongs to user %u, this process to user %u",
                           self->peer, (unsigned)user, (unsigned)mine);
}

// ---- receiving

// A receive has put n bytes into the empty buffer. Where they fill what they may, more of them are wanted.
static void tpr_tcp_took_ahead(tpr_tcp_conn *conn, uint8_t *buffer, uint32_t n) {
    conn->buffer = buffer;
    conn->at = 0;
    conn->end = n;
    if (TPR_UNLIKELY(n == conn->ahead)) conn->ahead = n < TPR_TCP_BUFFER / 4 ? 4 * n : (uint32_t)TPR_TCP_BUFFER;
}

// Receives into the empty buffer what is there. False: nothing was, for now or for good.
static bool tpr_tcp_fill(tpr_tcp_conn *conn) {
    tpr_tcp *tcp = conn->socket.tcp;
    tprpc_span span;
    if (conn->ended || conn->connecting) return false;
    span.size = conn->ahead;
    span.data = tpr_base_pool_alloc(&tcp->loop->pool, TPR_TCP_BUFFER);
    if (!span.data) {
        tpr_tcp_break(conn, ENOMEM);
        return false;
    }
    int64_t n = tpr_os_recv(conn->socket.fd, &span, 1, NULL, NULL);
    int code = n < 0 ? errno : TPR_TCP_EOF;
    conn->drained = n < (int64_t)span.size;
    if (TPR_LIKELY(n > 0)) {
        tpr_tcp_took_ahead(conn, (uint8_t *)span.data, (uint32_t)n);
        tcp->quota -= n;
        tcp->received += (uint64_t)n;
        return true;
    }
    tpr_base_pool_free(&tcp->loop->pool, span.data, TPR_TCP_BUFFER);
    if (code == EAGAIN || code == ENOMEM || code == ENOBUFS) return false;
    conn->ended = true;
    tpr_tcp_break(conn, code);
    return false;
}

// Whether the owner may have the socket asked: not when it was drained, and not beyond his share of this progress.
static bool tpr_tcp_may_receive(tpr_tcp_conn *conn) {
    if (conn->ended || conn->connecting || (conn->drained && !conn->cause)) return false;
    if (conn->socket.tcp->quota <= 0) conn->socket.tcp->eager = TPR_TCP_EAGER;
    return conn->socket.tcp->quota > 0;
}

static tprpc_span tpr_tcp_peek(void *at) {
    tpr_tcp_conn *conn = (tpr_tcp_conn *)at;
    tprpc_span span = {NULL, 0};
    conn->direct = false;
    if (!conn->buffer && (!tpr_tcp_may_receive(conn) || !tpr_tcp_fill(conn))) return span;
    span.data = conn->buffer + conn->at;
    span.size = conn->end - conn->at;
    return span;
}

static void tpr_tcp_consume(void *at, size_t size) {
    tpr_tcp_conn *conn = (tpr_tcp_conn *)at;
    TPRPC_ASSERT(size <= conn->end - conn->at);
    conn->at += (uint32_t)size;
    if (conn->at < conn->end || !conn->buffer) return;
    tpr_base_pool_free(&conn->socket.tcp->loop->pool, conn->buffer, TPR_TCP_BUFFER);
    conn->buffer = NULL;
    if (TPR_UNLIKELY(!(conn->socket.interest & (uint32_t)TPR_OS_READABLE)))
        tpr_tcp_conn_watch(conn, conn->socket.interest | (uint32_t)TPR_OS_READABLE);
}

// Pieces of the caller's spans that fit one system call.
typedef struct tpr_tcp_part { tprpc_span spans[TPR_OS_SPANS]; size_t count, size; bool last; } tpr_tcp_part;

// What follows the first `skip` bytes, at most `limit` bytes in at most `most` pieces; last: nothing is left after it.
static void tpr_tcp_part_of(tpr_tcp_part *part, const tprpc_span *spans, size_t count, size_t skip, size_t limit,
                            size_t most) {
    part->count = part->size = 0;
    part->last = true;
    for (size_t i = 0; i < count; i++) {
        size_t size = spans[i].size, take;
        if (size <= skip) {
            skip -= size;
            continue;
        }
        take = size - skip < limit - part->size ? size - skip : limit - part->size;
        part->last = take == size - skip && part->count < most;
        if (take == 0 || part->count == most) return;
        part->spans[part->count].data = (uint8_t *)spans[i].data + skip;
        part->spans[part->count++].size = take;
        part->size += take;
        skip = 0;
        if (!part->last) return;
    }
}

// Receives a part straight to where it belongs and, when nothing is wanted after it, what follows into the empty
// buffer, so that the next header costs no call of its own. Returns how many bytes of the part came.
static size_t tpr_tcp_recv_part(tpr_tcp_conn *conn, tpr_tcp_part *part) {
    tpr_tcp *tcp = conn->socket.tcp;
    size_t asked = part->size, count = part->count, wanted = part->size;
    uint8_t *buffer = part->last ? (uint8_t *)tpr_base_pool_alloc(&tcp->loop->pool, TPR_TCP_BUFFER) : NULL;
    if (wanted >= TPR_TCP_LARGE) conn->ahead = TPR_TCP_AHEAD;
    if (buffer) {
        part->spans[count].data = buffer;
        part->spans[count++].size = conn->ahead;
        asked += conn->ahead;
    }
    int64_t n = tpr_os_recv(conn->socket.fd, part->spans, count, NULL, NULL);
    int code = n < 0 ? errno : TPR_TCP_EOF;
    size_t got = n > 0 ? (size_t)n : 0;
    conn->drained = got < asked;
    tcp->quota -= (int64_t)got;
    tcp->received += got;
    if (got > wanted) {
        tpr_tcp_took_ahead(conn, buffer, (uint32_t)(got - wanted));
        got = wanted;
    } else {
        tpr_base_pool_free(&tcp->loop->pool, buffer, TPR_TCP_BUFFER);
    }
    if (n <= 0 && (conn->cause || (code != EAGAIN && code != ENOMEM && code != ENOBUFS))) {
        conn->ended = true;
        tpr_tcp_break(conn, code);
    }
    return got;
}

static size_t tpr_tcp_recv(void *at, const tprpc_span *spans, size_t count) {
    tpr_tcp_conn *conn = (tpr_tcp_conn *)at;
    tpr_tcp_part part;
    size_t got = 0;
    for (;;) {
        size_t had = conn->buffer ? conn->end - conn->at : 0;
        bool ask = !had && tpr_tcp_may_receive(conn);
        size_t limit = had ? had : ask ? (size_t)conn->socket.tcp->quota : 1;
        tpr_tcp_part_of(&part, spans, count, got, limit, TPR_OS_SPANS - 1);
        conn->direct = part.size > 0;
        if (!part.size || (!had && !ask)) break;
        if (had) {
            for (size_t i = 0; i < part.count; i++) {
                memcpy(part.spans[i].data, conn->buffer + conn->at, part.spans[i].size);
                conn->at += (uint32_t)part.spans[i].size;
            }
            got += part.size;
            tpr_tcp_consume(conn, 0);
        } else {
            got += tpr_tcp_recv_part(conn, &part);
        }
    }
    if (conn->direct) {
        conn->socket.tcp->eager = TPR_TCP_EAGER;
        tpr_tcp_inside(conn);
    }
    return got;
}

static size_t tpr_tcp_take_handles(void *conn, intptr_t *out, size_t capacity) {
    (void)conn;
    (void)out;
    (void)capacity;
    return 0;
}

// ---- sending

// Something may stay without an ACK from here on. The timer runs only while that is so of any connection.
static void tpr_tcp_suspect(tpr_tcp_conn *conn) {
    tpr_tcp *tcp = conn->socket.tcp;
    conn->unproven = true;
    conn->waiting_us = 0;
    if (!tpr_timer_is_set(&tcp->check))
        tpr_loop_timer(tcp->loop, &tcp->check, tpr_loop_clock(tcp->loop) + TPR_TCP_CHECK_US);
}

static size_t tpr_tcp_send(void *at, const tprpc_span *spans, size_t count, const intptr_t *handles,
                           size_t handle_count, bool more) {
    tpr_tcp_conn *conn = (tpr_tcp_conn *)at;
    tpr_tcp_part part;
    size_t total = 0, taken = 0;
    TPRPC_ASSERT(handle_count == 0);
    (void)handles;
    (void)handle_count;
    for (size_t i = 0; i < count; i++) total += spans[i].size;
    if (TPR_UNLIKELY(conn->cause)) return total;
    while (!conn->connecting && taken < total && taken < TPR_TCP_CHUNK) {
        tpr_tcp_part_of(&part, spans, count, taken, TPR_TCP_CHUNK - taken, TPR_OS_SPANS);
        // A large piece leaves at once: held back for what follows (MSG_MORE), its last packet left a stream over
        // loopback waiting, at 0.65 of the rate (64 MiB, 2-core x86-64 VM).
        bool hold = (more || !part.last) && part.size < TPR_TCP_LARGE;
        int64_t n = tpr_os_send(conn->socket.fd, part.spans, part.count, NULL, 0, hold);
        if (n < 0 && errno != EAGAIN && errno != ENOMEM && errno != ENOBUFS) {
            tpr_tcp_break(conn, errno);
            return total;
        }
        if (n > 0) taken += (size_t)n;
        if (n < (int64_t)part.size) break;
    }
    if (TPR_UNLIKELY(taken && !conn->unproven)) tpr_tcp_suspect(conn);
    if (taken == total) return taken;
    conn->want_send = true;
    conn->socket.tcp->eager = TPR_TCP_EAGER;
    tpr_tcp_inside(conn);
    tpr_tcp_conn_watch(conn, conn->socket.interest | (uint32_t)TPR_OS_WRITABLE);
    return conn->cause ? total : taken;
}

// The slow look for peers that are gone while bytes are under way, which keep-alive does not see. A peer is alive while
// its kernel acknowledges anything, window probes included. The time counts from the first of an unbroken row of looks
// that found something unanswered: before, there was nothing to answer, and a probe may have been on its way only now.
TPR_COLD static void tpr_tcp_check(tprpc_work *work) {
    tpr_tcp *tcp = TPR_CONTAINER(work, tpr_tcp, check);
    int64_t now = tpr_loop_clock(tcp->loop);
    bool again = false;
    tpr_base_list *next;
    for (tpr_base_list *i = tcp->sockets.next; i != &tcp->sockets; i = next) {
        tpr_tcp_conn *conn = TPR_CONTAINER(i, tpr_tcp_conn, socket.node);
        next = i->next;
        if (conn->socket.listening || !conn->unproven || conn->cause) continue;
        conn->unproven = tpr_os_tcp_queued(conn->socket.fd) != 0;
        if (!conn->unproven) continue;
        again = true;
        int64_t silent_ms = tpr_os_tcp_silent_ms(conn->socket.fd);
        if (silent_ms < 0) conn->waiting_us = 0;
        else if (!conn->waiting_us) conn->waiting_us = now;
        else if (now - conn->waiting_us >= tcp->silence_us && silent_ms >= tcp->silence_us / 1000)
            tpr_tcp_break(conn, TPR_TCP_SILENT);
    }
    if (again) tpr_loop_timer(tcp->loop, work, now + TPR_TCP_CHECK_US);
}

// ---- connecting, listening

static tpr_tcp_conn *tpr_tcp_conn_new(tpr_tcp *tcp) {
    tpr_tcp_conn *conn = (tpr_tcp_conn *)(void *)tpr_tcp_socket_new(tcp, false);
    if (conn) conn->ahead = TPR_TCP_BUFFER;
    return conn;
}

TPR_COLD
static tprpc_status tpr_tcp_connect(void *instance, const char *address, uint32_t lane, tprpc_conn_owner *owner,
                                    void **conn, tprpc_error *error) {
    tpr_tcp *tcp = (tpr_tcp *)instance;
    tpr_os_address to;
    uint32_t none[4];
    tprpc_status status = tpr_tcp_parse(address, &to, error);
    (void)lane;   // each lane is a connection, whose port tells it from the others
    if (status != TPRPC_OK) return status;
    if (tpr_os_tcp_end(&to, none) == 0)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tcp address \"%.100s\": nobody listens on port 0",
                               address);
    tpr_tcp_conn *self = tpr_tcp_conn_new(tcp);
    if (!self) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "connecting to tcp://%.100s: no memory", address);
    int fd = tpr_os_socket(to.at.ss_family), code = 0;
    if (fd >= 0) {
        tpr_os_tcp_options(fd, TPR_TCP_KEEPALIVE_S);
        if (tpr_os_connect(fd, &to) != 0 && errno != EINPROGRESS) code = errno;
    }
    if (fd < 0 || !tpr_tcp_socket_add(&self->socket, fd, TPR_OS_WRITABLE)) {
        code = errno;
        tpr_os_close(fd);
        tpr_base_pool_free(&tcp->loop->pool, self, sizeof *self);
        return tpr_base_os_error(error, code, "connecting to tcp address", address);
    }
    tpr_os_address_text(&to, true, self->peer, sizeof self->peer);
    self->owner = owner;
    self->connecting = true;
    tcp->eager = TPR_TCP_EAGER;
    if (code) tpr_tcp_break(self, code);
    *conn = self;
    return TPRPC_OK;
}

TPR_COLD static void tpr_tcp_opened(tpr_tcp_conn *conn) {
    tpr_os_address here, there;
    int fd = conn->socket.fd, code = tpr_os_socket_error(fd);
    if (!code && (tpr_os_local_address(fd, &here) != 0 || tpr_os_peer_address(fd, &there) != 0)) code = errno;
    // A port that nobody listens on may be given to this very socket as its own, and then it is connected to itself.
    if (!code && here.size == there.size && memcmp(&here.at, &there.at, here.size) == 0) code = ECONNREFUSED;
    if (code) {
        tpr_tcp_break(conn, code);
        return;
    }
    conn->connecting = false;
    tpr_tcp_conn_watch(conn, TPR_OS_READABLE);
    if (conn->cause) return;
    tpr_tcp_event(conn, (uint32_t)TPRPC_EVENT_OPEN | (conn->want_send ? (uint32_t)TPRPC_EVENT_SEND : 0u), NULL);
}

TPR_COLD static void tpr_tcp_retry(tprpc_work *work) {
    tpr_tcp_listener *listener = TPR_CONTAINER(work, tpr_tcp_listener, retry);
    if (!tpr_tcp_watch(&listener->socket, TPR_OS_READABLE))
        tpr_loop_timer(listener->socket.tcp->loop, work, tpr_loop_clock(listener->socket.tcp->loop) + TPR_TCP_RETRY_US);
}

// Lets the queue of connections be for a moment, rather than spinning on what cannot be accepted.
static void tpr_tcp_pause(tpr_tcp_listener *listener, int code) {
    tpr_loop *loop = listener->socket.tcp->loop;
    char address[64];
    if (!listener->warned) {
        tpr_tcp_address(listener, address, sizeof address);
        TPR_LOG(&loop->env->logger, TPRPC_LOG_WARNING, "tcp", "",
                "cannot accept connections on tcp://%s: %s; trying again every %d ms", address, strerror(code),
                TPR_TCP_RETRY_US / 1000);
    }
    listener->warned = true;
    tpr_tcp_watch(&listener->socket, 0);
    if (!tpr_timer_is_set(&listener->retry))
        tpr_loop_timer(loop, &listener->retry, tpr_loop_clock(loop) + TPR_TCP_RETRY_US);
}

TPR_COLD static bool tpr_tcp_accept(tpr_tcp_listener *listener) {
    tpr_tcp *tcp = listener->socket.tcp;
    tpr_os_address from;
    for (int i = 0; i < TPR_TCP_ACCEPTS && !listener->socket.closed; i++) {
        tpr_tcp_conn *conn = tpr_tcp_conn_new(tcp);   // first: what is not accepted is not lost
        int fd = conn ? tpr_os_accept(listener->socket.fd) : -1;
        if (fd >= 0 && tpr_tcp_socket_add(&conn->socket, fd, TPR_OS_READABLE)) {
            tpr_os_tcp_options(fd, TPR_TCP_KEEPALIVE_S);
            snprintf(conn->peer, sizeof conn->peer, "of unknown address");
            if (tpr_os_peer_address(fd, &from) == 0) tpr_os_address_text(&from, true, conn->peer, sizeof conn->peer);
            listener->owner->accepted(listener->owner, conn);
            continue;
        }
        int code = conn ? errno : ENOMEM;
        tpr_base_pool_free(&tcp->loop->pool, conn, sizeof *conn);
        tpr_os_close(fd);
        if (code == EAGAIN) return i > 0;
        if (code != ECONNABORTED && code != EINTR) {
            tpr_tcp_pause(listener, code);
            return i > 0;
        }
    }
    return true;
}

TPR_COLD
static tprpc_status tpr_tcp_listen(void *instance, const char *address, tprpc_listen_owner *owner, void **listener,
                                   tprpc_error *error) {
    tpr_tcp *tcp = (tpr_tcp *)instance;
    tpr_os_address at;
    tprpc_status status = tpr_tcp_parse(address[0] ? address : "127.0.0.1:0", &at, error);
    if (status != TPRPC_OK) return status;
    tpr_tcp_listener *self = (tpr_tcp_listener *)(void *)tpr_tcp_socket_new(tcp, true);
    if (!self) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "listening on tcp://%.100s: no memory", address);
    int fd = tpr_os_socket(at.at.ss_family);
    if (fd < 0 || tpr_os_listen(fd, &at) != 0 || !tpr_tcp_socket_add(&self->socket, fd, TPR_OS_READABLE)) {
        int code = errno;
        tpr_os_close(fd);
        tpr_base_pool_free(&tcp->loop->pool, self, sizeof *self);
        return tpr_base_os_error(error, code, "listening on tcp address", address);
    }
    self->owner = owner;
    self->retry.run = tpr_tcp_retry;
    *listener = self;
    return TPRPC_OK;
}

TPR_COLD static void tpr_tcp_unlisten(void *listener) {
    tpr_tcp_listener *self = (tpr_tcp_listener *)listener;
    tpr_timer_cancel(&self->socket.tcp->loop->wheel, &self->retry);
    tpr_tcp_socket_close(&self->socket);
}

static void tpr_tcp_own(void *conn, tprpc_conn_owner *owner) { ((tpr_tcp_conn *)conn)->owner = owner; }

static void tpr_tcp_disconnect(void *at, tprpc_status cause) {
    tpr_tcp_conn *conn = (tpr_tcp_conn *)at;
    (void)cause;
    tpr_tcp_cool(conn);
    tpr_base_pool_free(&conn->socket.tcp->loop->pool, conn->buffer, TPR_TCP_BUFFER);
    conn->buffer = NULL;
    tpr_tcp_socket_close(&conn->socket);
}

// ---- progress

// The socket may have bytes: they are received here, or by the owner when he waits for them.
static bool tpr_tcp_receive(tpr_tcp_conn *conn) {
    tpr_tcp *tcp = conn->socket.tcp;
    uint64_t before = tcp->received;
    tcp->quota = TPR_TCP_CHUNK;
    conn->drained = false;
    if (!conn->direct && !tpr_tcp_fill(conn)) return false;
    tpr_tcp_event(conn, TPRPC_EVENT_RECV, NULL);
    if (conn->socket.closed || conn->cause) return true;
    if (tcp->received == before) conn->direct = false;   // he changed his mind
    else tpr_tcp_heat(conn);
    return true;
}

// The poller reported `events`. What it reports in vain is asked for no more, until it is wanted again.
static bool tpr_tcp_ready(tpr_tcp_conn *conn, uint32_t events) {
    if (conn->connecting) {
        tpr_tcp_opened(conn);
        return true;
    }
    if ((events & (uint32_t)TPR_OS_WRITABLE) && !conn->want_send) {
        tpr_tcp_conn_watch(conn, conn->socket.interest & ~(uint32_t)TPR_OS_WRITABLE);
    } else if (events & (uint32_t)TPR_OS_WRITABLE) {
        conn->want_send = false;
        tpr_tcp_event(conn, TPRPC_EVENT_SEND, NULL);
        if (conn->socket.closed) return true;
    }
    if (!(events & ((uint32_t)TPR_OS_READABLE | (uint32_t)TPR_OS_HANGUP)) || conn->cause) return true;
    if (!conn->buffer) return tpr_tcp_receive(conn);
    if (conn->socket.interest & (uint32_t)TPR_OS_READABLE) {
        tpr_tcp_conn_watch(conn, conn->socket.interest & ~(uint32_t)TPR_OS_READABLE);
    } else {   // a reset, or the end of both directions: reported whether asked for or not
        int code = tpr_os_socket_error(conn->socket.fd);
        tpr_tcp_break(conn, code ? code : ECONNRESET);
    }
    return true;
}

// Handles what the poller reports until `stop` bytes were received, but one event at least.
static bool tpr_tcp_look(tpr_tcp *tcp, uint64_t stop) {
    tpr_os_event events[TPR_TCP_EVENTS];
    bool did = false;
    int n = tpr_os_poller_wait(tcp->poller, events, TPR_TCP_EVENTS, 0);
    tcp->armed = false;
    tcp->calls = 0;
    tcp->looked_us = tcp->loop->now_us;
    if (tcp->eager) tcp->eager--;
    for (uint32_t i = 0; n > 0 && i < (uint32_t)n && (i == 0 || tcp->received < stop); i++, tcp->first++) {
        // Those that are left out for lack of time are reported first the next time: begin anywhere but at the first.
        tpr_tcp_socket *socket = (tpr_tcp_socket *)events[tcp->first % (uint32_t)n].user;
        uint32_t what = events[tcp->first % (uint32_t)n].events;
        if (socket->closed) continue;
        did |= socket->listening ? tpr_tcp_accept((tpr_tcp_listener *)(void *)socket)
                                 : tpr_tcp_ready((tpr_tcp_conn *)(void *)socket, what);
    }
    if (n == TPR_TCP_EVENTS && !tcp->eager) tcp->eager = 1;
    return did;
}

TPR_COLD static void tpr_tcp_lost(tpr_tcp_conn *conn) {
    tprpc_error error;
    tprpc_status status = tpr_base_status_of(conn->cause);
    if (status != TPRPC_ERROR_MEMORY && status != TPRPC_ERROR_LIMIT) status = TPRPC_ERROR_PEER;
    if (conn->connecting)
        tprpc_error_set(&error, TPRPC_ERROR_UNREACHABLE, conn->cause, "connecting to tcp://%s: %s", conn->peer,
                        strerror(conn->cause));
    else if (conn->cause == TPR_TCP_EOF)
        tprpc_error_set(&error, TPRPC_ERROR_PEER, 0, "tcp %s closed the connection", conn->peer);
    else if (conn->cause == TPR_TCP_SILENT)
        tprpc_error_set(&error, TPRPC_ERROR_PEER, ETIMEDOUT, "tcp %s has acknowledged nothing for %d s", conn->peer,
                        TPR_TCP_KEEPALIVE_S);
    else tprpc_error_set(&error, status, conn->cause, "tcp %s: %s", conn->peer, strerror(conn->cause));
    tpr_tcp_event(conn, TPRPC_EVENT_LOST, &error);
}

// Tells the owners of broken connections, after what had come before and is still in the socket.
TPR_COLD static void tpr_tcp_tell(tpr_tcp *tcp) {
    while (!tpr_base_list_empty(&tcp->broken)) {
        tpr_tcp_conn *conn = TPR_CONTAINER(tcp->broken.next, tpr_tcp_conn, socket.node);
        tcp->quota = 2 * TPR_TCP_CHUNK;
        while (!conn->socket.closed && !conn->buffer && tcp->quota > 0 && tpr_tcp_fill(conn))
            tpr_tcp_event(conn, TPRPC_EVENT_RECV, NULL);
        if (conn->socket.closed) continue;
        if (tcp->quota <= 0 && !conn->buffer) return;   // the rest is the next progress's
        tpr_base_list_remove(&conn->socket.node);
        tpr_base_list_add(&tcp->sockets, &conn->socket.node);
        tpr_tcp_lost(conn);
    }
}

TPR_APART static bool tpr_tcp_walk(tpr_tcp *tcp) {
    uint64_t before = tcp->received;
    int64_t since = tcp->loop->now_us - tcp->looked_us;
    bool did = false;
    tcp->walking = true;
    for (uint32_t i = 0; i < tcp->hot_count && tcp->received - before < TPR_TCP_CHUNK; i++) {
        tpr_tcp_conn *conn = tcp->hot[(tcp->hot_first + i) % tcp->hot_count];
        if (!conn->direct && !conn->buffer && tpr_tcp_receive(conn)) {
            did = true;
        } else if (++conn->idle > TPR_TCP_HOT_TRIES) {
            tpr_tcp_cool(conn);
            tpr_tcp_inside(conn);
        }
    }
    tcp->hot_first++;
    if (tcp->armed || tcp->eager || ++tcp->calls >= TPR_TCP_LOOK_CALLS || since >= TPR_TCP_LOOK_US || since < 0)
        did |= tpr_tcp_look(tcp, before + 2 * TPR_TCP_CHUNK);
    if (TPR_UNLIKELY(!tpr_base_list_empty(&tcp->broken))) {
        tpr_tcp_tell(tcp);
        did = true;
    }
    tcp->walking = false;
    tcp->quota = TPR_TCP_CHUNK;
    tcp->calls += (uint32_t)((tcp->received - before) / (TPR_TCP_CHUNK / 32));
    if (TPR_UNLIKELY(!tpr_base_list_empty(&tcp->closed))) tpr_tcp_sweep(tcp);
    return did;
}

// Most calls are the turns of a loop that waits for something else: they save no register and touch little.
static bool tpr_tcp_progress(void *instance) {
    tpr_tcp *tcp = (tpr_tcp *)instance;
    if (tpr_base_list_empty(&tcp->sockets) && tpr_base_list_empty(&tcp->broken)) return false;
    bool quiet = !tcp->hot_count && !tcp->armed && !tcp->eager && tpr_base_list_empty(&tcp->broken) &&
                 tpr_base_list_empty(&tcp->closed);
    if (!quiet || tcp->calls + 1 >= TPR_TCP_LOOK_CALLS ||
        (uint64_t)(tcp->loop->now_us - tcp->looked_us) >= TPR_TCP_LOOK_US) return tpr_tcp_walk(tcp);
    tcp->calls++;
    tcp->quota = TPR_TCP_CHUNK;
    return false;
}

static bool tpr_tcp_arm(void *instance, int64_t *deadline_us) {
    tpr_tcp *tcp = (tpr_tcp *)instance;
    (void)deadline_us;
    tcp->armed = true;
    for (uint32_t i = tcp->hot_count; i-- > 0;) tpr_tcp_inside(tcp->hot[i]);   // one that breaks leaves the set
    return tpr_base_list_empty(&tcp->broken);
}

static intptr_t tpr_tcp_handle(void *instance) { return ((tpr_tcp *)instance)->poller; }

// ---- birth and death

enum { TPR_TCP_TAG = 0x20706374 };   // "tcp "

static tprpc_status tpr_tcp_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    tpr_loop *loop = &host->context->loops[host->loop];
    (void)user;
    tpr_tcp *tcp = (tpr_tcp *)tpr_base_new(&loop->env->memory, sizeof *tcp, (uint32_t)TPR_TCP_TAG);
    if (!tcp) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "tcp: no memory");
    tcp->poller = tpr_os_poller();
    if (tcp->poller < 0) {
        int code = errno;
        tpr_base_free(&loop->env->memory, tcp, sizeof *tcp, (uint32_t)TPR_TCP_TAG);
        return tpr_base_os_error(error, code, "creating", "tcp's poller");
    }
    tcp->loop = loop;
    tcp->quota = TPR_TCP_CHUNK;
    tcp->silence_us = TPR_TCP_KEEPALIVE_S * INT64_C(1000000);
    tcp->check.run = tpr_tcp_check;
    tpr_base_list_init(&tcp->sockets);
    tpr_base_list_init(&tcp->broken);
    tpr_base_list_init(&tcp->closed);
    *instance = tcp;
    return TPRPC_OK;
}

TPR_COLD static void tpr_tcp_close(void *instance) {
    tpr_tcp *tcp = (tpr_tcp *)instance;
    tpr_timer_cancel(&tcp->loop->wheel, &tcp->check);
    tpr_tcp_sweep(tcp);
    tpr_os_close(tcp->poller);
    tpr_base_free(&tcp->loop->env->memory, tcp, sizeof *tcp, (uint32_t)TPR_TCP_TAG);
}

static const tprpc_transport_table tpr_tcp_table = {
    sizeof(tprpc_transport_table), TPRPC_TRANSPORT_HOST_PORT | TPRPC_TRANSPORT_LANES,
    tpr_tcp_open, tpr_tcp_close, tpr_tcp_domain, tpr_tcp_reaches,
    tpr_tcp_progress, tpr_tcp_arm, tpr_tcp_handle,
    tpr_tcp_listen, tpr_tcp_address, tpr_tcp_unlisten, tpr_tcp_public_address,
    tpr_tcp_connect, tpr_tcp_own, tpr_tcp_send, tpr_tcp_peek, tpr_tcp_consume, tpr_tcp_recv, tpr_tcp_take_handles,
    tpr_tcp_peer, tpr_tcp_check_peer, NULL, tpr_tcp_disconnect
};
static const tprpc_backend tpr_tcp_backend = {
    sizeof(tprpc_backend), TPRPC_VERSION, "tcp", "TCP over IPv4 and IPv6: reaches every host, through the kernel.", 0,
    &tpr_tcp_table, NULL, NULL, NULL
};
#endif // TPRPC_NO_TCP

// >>shm ---------------------------------------------------------------------------------------------------------------
// Connections between processes of one user on one host. Bytes go through two rings, one per direction, in a sealed
// memfd that both ends map; an UNIX socket beside passes the memfd, descriptors and wake-up bytes, and tells when the
// peer ends.
//
// A ring carries records, each on cache lines of its own: a commit word (the payload's size + 1, or SKIP: go on at the
// ring's start), then the payload. A receiver looks at the commit word of the next record alone, so a small message
// costs the lines it lies in. A writer zeroes the word of the record that will follow before it commits one, and keeps
// a line free for that.
//
// An instance looks at the commit words of its hot connections alone. Every other connection is armed: its peer, having
// published something, sees the odd number in `armed` and sends one byte through the socket, once for each such number.
//
// Uses: atomic, os, base, wire, timer, process, loop, context.
// Invariant: each word in shared memory has one writer. A connection is hot or armed, or lost. What is read from shared
// memory is checked against private positions before it is used: a peer may scribble at any time.

#ifndef TPRPC_NO_SHM

enum {
    TPR_SHM_RING = 256 << 10,          // bytes of one direction
    TPR_SHM_RING_LEAST = 128 << 10, TPR_SHM_RING_MOST = 16 << 20,   // that a peer may choose
    TPR_SHM_LINE = 64, TPR_SHM_WORD = 4,   // a cache line; the commit word, which the payload follows
    TPR_SHM_SKIP = 0x40000000,
    TPR_SHM_RECORD = (16 << 10) - TPR_SHM_WORD,   // the largest payload written: the receiver starts on it while
                                                  // the next is copied
    TPR_SHM_WHOLE = 4 << 10,           // what is sent at once up to here stays in one piece
    TPR_SHM_CRUMB = 1 << 10,           // and larger pieces than this are not cut off
    TPR_SHM_HOT = 64,
    TPR_SHM_IDLE_TURNS = 20000,        // after which a hot connection is armed
    TPR_SHM_LOOK_TURNS = 512,          // between looks at the sockets while spinning,
    TPR_SHM_LOOK_US = 100,             // or this time: who polls once in a frame looks every time
    TPR_SHM_HANDLES = 32,              // sent and not taken
    TPR_SHM_EVENTS = 32,
    TPR_SHM_HELLO = 16, TPR_SHM_MAGIC = 0x53525054, TPR_SHM_VERSION = 1,   // "TPRS"
    TPR_SHM_HANDSHAKE_US = 10000000, TPR_SHM_RETRY_US = 5000, TPR_SHM_PAUSE_US = 100000,
    TPR_SHM_TRIM_US = 1000000,         // between looks at rings that were written, and how long one must be idle
    TPR_SHM_LEFT_US = 10000,           // how long what a control group leaves is believed,
    TPR_SHM_LEFT_LEAST = 1 << 20,      // of which so much is not used up
    TPR_SHM_NAME = 101,                // the longest name of a socket, with its final 0
    TPR_SHM_TAG = 0x206d6873           // "shm "
};

typedef struct tpr_shm_end {           // what one end alone writes; two cache lines, for processors fetch them in pairs
    uint32_t armed;                    // odd: wants a byte when something is published
    uint32_t wants;                    // and when room is given back
    uint32_t gone;                     // closed on purpose
    uint32_t taken;                    // descriptors
    uint64_t consumed;                 // position in the ring that it reads
    uint8_t  pad[104];
} tpr_shm_end;

typedef struct tpr_shm_shared {        // the mapping begins with it; the connector's end and ring are the first
    tpr_shm_end ends[2];
    uint8_t pad[4096 - 2 * sizeof(tpr_shm_end)];
} tpr_shm_shared;

typedef enum tpr_shm_kind { TPR_SHM_IS_CONN, TPR_SHM_IS_LISTENER } tpr_shm_kind;
typedef struct tpr_shm_watch {         // heads what the poller points to
    tpr_base_list node;                // of the dead, which are freed at the end of progress
    tpr_shm_kind  kind;
    bool          closed;
} tpr_shm_watch;

typedef enum tpr_shm_state {
    TPR_SHM_CONNECTING,                // the listener's queue was full: tried again
    TPR_SHM_ASKING,                    // hello is said, the answer awaited
    TPR_SHM_ASKED,                     // hello is awaited
    TPR_SHM_OPEN
} tpr_shm_state;

typedef struct tpr_shm_conn {
    // what a look at a quiet connection needs
    uint8_t  *rx;                      // the ring
    uint64_t  rx_pos;                  // of the current record; positions only grow
    uint32_t  rx_size, rx_used;        // its payload, and what was consumed of that; 0: not looked at
    uint64_t  mask;                    // of positions
    uint64_t  rx_told;                 // rx_pos as the peer knows it
    tprpc_conn_owner *owner;           // NULL until it is accepted
    tpr_shm_end *mine, *theirs;
    // what sending needs
    uint8_t  *tx;
    uint64_t  tx_pos, tx_seen;         // tx_seen: consumed by the peer, as it said last
    uint32_t  woken, epoch;            // the peer's `armed` that was answered; our own
    int32_t   hot;                     // place in the hot set, or -1
    bool      wants, blocked, opened, lost;   // wants: SEND is owed; blocked: the socket is full; opened: OPEN is owed
    uint64_t  active;                  // the turn it last did something
    struct tpr_shm_instance *instance;
    // the rest
    tpr_shm_watch   watch;
    tpr_base_list   ripe, node;        // in the instance's lists: has something to report; handshakes
    tpr_shm_state   state;
    tprpc_status    status;            // not OK: it is over, and why
    int32_t         os_code;
    const char     *why;
    uint64_t        rx_stop;           // when it is over: what lies before may still be read
    tpr_shm_shared *shared;
    size_t          shared_size, charged;   // charged: by the connector, against the context's memory
    tpr_base_list   written;           // of those whose ring is to be given back,
    uint64_t        written_pos;       // which stood here a while ago
    int             fd, memfd;         // memfd: until it is passed
    int32_t         pid;
    tpr_process_watch process;
    struct tpr_shm_listener *listener; // that it came in by, until it is accepted
    tprpc_work      timer;
    int64_t         deadline_us;
    uint32_t        handles_sent, handles_taken, handle_count;
    intptr_t        handles[TPR_SHM_HANDLES];   // received
    uint32_t        hello_have;
    uint8_t         hello[TPR_SHM_HELLO];
    char            name[TPR_SHM_NAME];   // that it connects to
} tpr_shm_conn;

typedef struct tpr_shm_listener {
    tpr_shm_watch watch;               // first
    struct tpr_shm_instance *instance;
    tprpc_listen_owner *owner;
    tprpc_work timer;                  // there was no descriptor left: when it is tried again
    int  fd;
    char name[TPR_SHM_NAME];
} tpr_shm_listener;

typedef struct tpr_shm_instance {
    uint64_t turn, armed_turn;         // progress calls; at the last arm
    uint32_t hot_count, hand;          // hand: who leaves the hot set next
    bool     armed, busy;              // busy: in progress, so that nothing is freed
    int64_t  looked_us;                // when the sockets were looked at
    int      poller;
    tpr_base_list ripe, dead, handshakes, written;
    tprpc_work    trim;                // gives back the rings of those that are idle
    bool          trimming;            // it is set
    uint64_t      left;                // memory that the control groups leave, as of
    int64_t       left_us;             // then
    tpr_shm_conn *hot[TPR_SHM_HOT];
    tpr_loop      *loop;
    tprpc_context *ctx;
    uint32_t       handshake_count;
    size_t         domain_size;
    uint8_t        domain[64];
} tpr_shm_instance;

// ---- the end of things

static void *tpr_shm_new(tpr_shm_instance *instance, size_t size) {
    return tpr_base_new(&instance->ctx->env.memory, size, (uint32_t)TPR_SHM_TAG);
}

static void tpr_shm_free(tpr_shm_instance *instance, void *ptr, size_t size) {
    tpr_base_free(&instance->ctx->env.memory, ptr, size, (uint32_t)TPR_SHM_TAG);
}

static void tpr_shm_bury_one(tpr_shm_instance *instance, tpr_shm_watch *watch) {
    switch (watch->kind) {
    case TPR_SHM_IS_CONN:
        tpr_shm_free(instance, TPR_CONTAINER(watch, tpr_shm_conn, watch), sizeof(tpr_shm_conn));
        break;
    case TPR_SHM_IS_LISTENER: tpr_shm_free(instance, watch, sizeof(tpr_shm_listener)); break;
    }
}

// Frees the memory of what was closed; not while progress may still look at it.
TPR_COLD static void tpr_shm_bury(tpr_shm_instance *instance, tpr_shm_watch *watch) {
    watch->closed = true;
    if (instance->busy) tpr_base_list_add(&instance->dead, &watch->node);
    else tpr_shm_bury_one(instance, watch);
}

static void tpr_shm_ripen(tpr_shm_conn *conn) {
    tpr_base_list_remove(&conn->ripe);
    tpr_base_list_add(&conn->instance->ripe, &conn->ripe);
    if (TPR_ATOMIC_PEEK(&conn->instance->loop->asleep)) tpr_os_bell_ring(conn->instance->loop->bell);
}

static void tpr_shm_cool(tpr_shm_conn *conn) {
    tpr_shm_instance *instance = conn->instance;
    if (conn->hot < 0) return;
    tpr_shm_conn *last = instance->hot[--instance->hot_count];
    instance->hot[conn->hot] = last;
    last->hot = conn->hot;
    conn->hot = -1;
}

// The connection is over; LOST is said by the next progress, after what is in the ring. `why` lives for ever.
TPR_COLD static void tpr_shm_fail(tpr_shm_conn *conn, tprpc_status status, int os_code, const char *why) {
    if (conn->status != TPRPC_OK) return;
    conn->status = status;
    conn->os_code = os_code;
    conn->why = why;
    conn->rx_stop = status == TPRPC_ERROR_PEER ? conn->rx_pos + conn->mask + 1 : 0;
    if (!conn->rx_stop) conn->rx_size = 0;
    tpr_shm_cool(conn);
    if (conn->fd >= 0) tpr_os_poller_remove(conn->instance->poller, conn->fd);
    tpr_timer_cancel(&conn->instance->loop->wheel, &conn->timer);
    tpr_shm_ripen(conn);
}

static void tpr_shm_broken(tpr_shm_conn *conn) {
    tpr_shm_fail(conn, TPRPC_ERROR_PROTOCOL, 0, "wrote into the shared memory what the protocol forbids");
}

// The socket ended, or the process did.
static void tpr_shm_ended(tpr_shm_conn *conn, int os_code) {
    bool gone = conn->shared && TPR_ATOMIC_LOAD(&conn->theirs->gone);
    if (conn->state != TPR_SHM_OPEN) tpr_shm_fail(conn, TPRPC_ERROR_PEER, os_code, "closed it while it was made");
    else tpr_shm_fail(conn, TPRPC_ERROR_PEER, os_code, gone ? "closed the connection" : "died");
}

// Watches the peer's process.
static void tpr_shm_process_watch(tpr_shm_conn *conn) {
    if (!tpr_process_start(&conn->instance->loop->processes, conn->pid, &conn->process))
        tpr_shm_fail(conn, TPRPC_ERROR_PEER, 0, "died");
}

static void tpr_shm_process_ended(tpr_process_watch *watch) {
    tpr_shm_fail(TPR_CONTAINER(watch, tpr_shm_conn, process), TPRPC_ERROR_PEER, 0, "died");
}

// ---- the ring that is read

static inline uint32_t *tpr_shm_word(uint8_t *ring, uint64_t at) { return (uint32_t *)(void *)(ring + at); }

static inline uint64_t tpr_shm_record(size_t size) {
    return ((uint64_t)size + TPR_SHM_WORD + TPR_SHM_LINE - 1) & ~(uint64_t)(TPR_SHM_LINE - 1);
}

// Makes the record at rx_pos the current one. False: there is none.
static inline bool tpr_shm_next(tpr_shm_conn *conn) {
    for (;;) {
        uint64_t at = conn->rx_pos & conn->mask;
        uint32_t word = TPR_ATOMIC_LOAD(tpr_shm_word(conn->rx, at));
        if (!word || (TPR_UNLIKELY(conn->status != TPRPC_OK) && conn->rx_pos >= conn->rx_stop)) return false;
        if (TPR_UNLIKELY(word == TPR_SHM_SKIP) && at) {
            conn->rx_pos += conn->mask + 1 - at;
            continue;
        }
        if (TPR_UNLIKELY(word < 2 || word - 1 > conn->mask + 1 - at - TPR_SHM_WORD)) {
            tpr_shm_broken(conn);
            return false;
        }
        conn->rx_size = word - 1;
        conn->rx_used = 0;
        return true;
    }
}

static inline bool tpr_shm_has_data(tpr_shm_conn *conn) { return conn->rx_size || tpr_shm_next(conn); }

// After something was published: wakes the peer where it sleeps, once for each time that it went to sleep.
static inline void tpr_shm_wake(tpr_shm_conn *conn) {
    uint32_t armed = TPR_ATOMIC_LOAD_FULL(&conn->theirs->armed);
    if (TPR_LIKELY(!(armed & 1)) || armed == conn->woken || conn->status != TPRPC_OK) return;
    uint8_t zero = 0;
    tprpc_span span;
    conn->woken = armed;
    span.data = &zero;
    span.size = 1;
    if (tpr_os_send(conn->fd, &span, 1, NULL, 0, false) < 0 && errno != EAGAIN) tpr_shm_ended(conn, errno);
}

static void tpr_shm_wake_writer(tpr_shm_conn *conn) {
    if (TPR_ATOMIC_LOAD_FULL(&conn->theirs->wants)) tpr_shm_wake(conn);
}

static inline void tpr_shm_advance(tpr_shm_conn *conn, uint32_t size) {
    conn->rx_used += size;
    if (conn->rx_used < conn->rx_size) return;
    conn->rx_pos += tpr_shm_record(conn->rx_size);
    conn->rx_size = 0;
    // Not sooner: a line that the peer reads would move between the caches. Not later: it may need three quarters.
    if (TPR_LIKELY(conn->rx_pos - conn->rx_told <= conn->mask / 4)) return;
    conn->rx_told = conn->rx_pos;
    TPR_ATOMIC_STORE_FULL(&conn->mine->consumed, conn->rx_pos);
    tpr_shm_wake_writer(conn);
}

// ---- the ring that is written

TPR_COLD static void tpr_shm_trim_later(tpr_shm_conn *conn) {
    tpr_shm_instance *instance = conn->instance;
    conn->written_pos = conn->tx_pos;
    tpr_base_list_add(&instance->written, &conn->written);
    if (instance->trimming) return;
    instance->trimming = true;
    tpr_loop_timer(instance->loop, &instance->trim, tpr_loop_clock(instance->loop) + TPR_SHM_TRIM_US);
}

// Learns what the peer has consumed. False: it lies.
static bool tpr_shm_refresh(tpr_shm_conn *conn) {
    uint64_t consumed = TPR_ATOMIC_LOAD_FULL(&conn->theirs->consumed);
    if (consumed - conn->tx_seen > conn->tx_pos - conn->tx_seen || consumed % TPR_SHM_LINE) {
        tpr_shm_broken(conn);
        return false;
    }
    conn->tx_seen = consumed;
    if (TPR_UNLIKELY(tpr_base_list_empty(&conn->written))) tpr_shm_trim_later(conn);
    return true;
}

// Bytes that may be written, a line for the commit word after them left out.
static inline uint64_t tpr_shm_room(const tpr_shm_conn *conn) {
    return conn->mask + 1 - TPR_SHM_LINE - (conn->tx_pos - conn->tx_seen);
}

// Gives the pages of the ring that is written back where nothing lies in them. The reader looks at the word of the
// record to come, which is 0 and stays.
TPR_COLD static void tpr_shm_trim_one(tpr_shm_conn *conn) {
    const uint64_t ring = conn->mask + 1, from = conn->tx_pos + TPR_SHM_LINE, at = from & conn->mask;
    if (!tpr_shm_refresh(conn) || from >= conn->tx_seen + ring) return;
    const size_t size = (size_t)(conn->tx_seen + ring - from), first = size < ring - at ? size : (size_t)(ring - at);
    tpr_os_give_back(conn->tx + at, first);
    tpr_os_give_back(conn->tx, size - first);
}

// The rings that have been written and are idle.
TPR_COLD static void tpr_shm_trim(tprpc_work *work) {
    tpr_shm_instance *instance = TPR_CONTAINER(work, tpr_shm_instance, trim);
    for (tpr_base_list *node = instance->written.next, *next; node != &instance->written; node = next) {
        tpr_shm_conn *conn = TPR_CONTAINER(node, tpr_shm_conn, written);
        const bool idle = conn->tx_pos == conn->written_pos;
        next = node->next;
        conn->written_pos = conn->tx_pos;
        if (conn->status == TPRPC_OK && !idle) continue;
        if (conn->status == TPRPC_OK) tpr_shm_trim_one(conn);
        tpr_base_list_remove(node);
    }
    instance->trimming = !tpr_base_list_empty(&instance->written);
    if (instance->trimming) tpr_loop_timer(instance->loop, work, tpr_loop_clock(instance->loop) + TPR_SHM_TRIM_US);
}

// How much of `left` bytes the next record can hold; 0: the ring is full. May move tx_pos to the ring's start.
static inline size_t tpr_shm_fit(tpr_shm_conn *conn, size_t left) {
    size_t size = left < TPR_SHM_RECORD ? left : (size_t)TPR_SHM_RECORD;
    uint64_t at = conn->tx_pos & conn->mask, to_end = conn->mask + 1 - at, room = tpr_shm_room(conn);
    uint64_t need = tpr_shm_record(size);
    if (TPR_UNLIKELY(need > to_end)) {
        if (left <= TPR_SHM_WHOLE || to_end < TPR_SHM_CRUMB) {
            if (room < to_end + need) return 0;
            TPR_ATOMIC_POKE(tpr_shm_word(conn->tx, 0), 0u);
            TPR_ATOMIC_STORE(tpr_shm_word(conn->tx, at), (uint32_t)TPR_SHM_SKIP);
            conn->tx_pos += to_end;
            return size;
        }
        need = to_end;
    }
    if (TPR_UNLIKELY(room < need)) {
        if (left <= TPR_SHM_WHOLE || room < TPR_SHM_CRUMB) return 0;
        need = room;
    }
    return need - TPR_SHM_WORD < size ? (size_t)need - TPR_SHM_WORD : size;
}

// SEND is owed from here on: the peer is told that room, or the taking of descriptors, is waited for. The caller looks
// again after that.
static void tpr_shm_want(tpr_shm_conn *conn) {
    conn->wants = true;
    TPR_ATOMIC_STORE_FULL(&conn->mine->wants, 1u);
}

static void tpr_shm_want_no_more(tpr_shm_conn *conn) {
    conn->wants = false;
    TPR_ATOMIC_POKE(&conn->mine->wants, 0u);
}

// The ring is full. Returns whether there is room after all.
static bool tpr_shm_full(tpr_shm_conn *conn, size_t left) {
    tpr_shm_want(conn);
    tpr_shm_wake(conn);                // for what was published without a barrier
    if (!tpr_shm_refresh(conn) || !tpr_shm_fit(conn, left)) return false;
    tpr_shm_want_no_more(conn);
    return true;
}

// Whether SEND may follow: the peer gives room back a quarter of the ring at a time, and descriptors one by one.
static bool tpr_shm_may_send(tpr_shm_conn *conn) {
    uint32_t untaken = conn->handles_sent - TPR_ATOMIC_LOAD_FULL(&conn->theirs->taken);
    return !conn->blocked && untaken <= (uint32_t)TPR_SHM_HANDLES - (uint32_t)TPR_OS_HANDLES && tpr_shm_refresh(conn) &&
           tpr_shm_room(conn) >= conn->mask / 4;
}

typedef struct tpr_shm_cursor { const tprpc_span *span; size_t used; } tpr_shm_cursor;

// Copies the next `size` bytes of spans.
static inline void tpr_shm_gather(tpr_shm_cursor *from, uint8_t *to, size_t size) {
    while (size) {
        size_t n = from->span->size - from->used;
        if (n == 0) {
            from->span++;
            from->used = 0;
            continue;
        }
        if (n > size) n = size;
        memcpy(to, (const uint8_t *)from->span->data + from->used, n);
        to += n;
        size -= n;
        from->used += n;
    }
}

// Writes a record that fits and commits it. quiet: the next follows at once, so the peer need not be woken for this.
static inline void tpr_shm_put(tpr_shm_conn *conn, tpr_shm_cursor *from, size_t size, bool quiet) {
    uint32_t *word = tpr_shm_word(conn->tx, conn->tx_pos & conn->mask);
    conn->tx_pos += tpr_shm_record(size);
    TPR_ATOMIC_POKE(tpr_shm_word(conn->tx, conn->tx_pos & conn->mask), 0u);
    tpr_shm_gather(from, (uint8_t *)(word + 1), size);
    if (quiet) {
        TPR_ATOMIC_STORE(word, (uint32_t)size + 1);
    } else {
        TPR_ATOMIC_STORE_FULL(word, (uint32_t)size + 1);
        tpr_shm_wake(conn);
    }
}

// ---- hot and armed

// Asks the peer for a wake-up byte. False: there is something to do now.
static bool tpr_shm_arm_one(tpr_shm_conn *conn) {
    if (!(conn->epoch & 1)) TPR_ATOMIC_STORE_FULL(&conn->mine->armed, ++conn->epoch);
    if (conn->rx_size || TPR_ATOMIC_LOAD_FULL(tpr_shm_word(conn->rx, conn->rx_pos & conn->mask))) return false;
    return !conn->wants || !tpr_shm_may_send(conn);
}

static void tpr_shm_disarm_one(tpr_shm_conn *conn) {
    if (conn->epoch & 1) TPR_ATOMIC_POKE(&conn->mine->armed, ++conn->epoch);
}

// Takes a connection out of the hot set and arms it.
static void tpr_shm_put_away(tpr_shm_conn *conn) {
    tpr_shm_cool(conn);
    if (!tpr_shm_arm_one(conn)) tpr_shm_ripen(conn);
}

static void tpr_shm_heat(tpr_shm_conn *conn) {
    tpr_shm_instance *instance = conn->instance;
    if (conn->state != TPR_SHM_OPEN || conn->status != TPRPC_OK) return;
    conn->active = instance->turn;
    if (conn->hot >= 0) return;
    if (instance->hot_count == TPR_SHM_HOT) tpr_shm_put_away(instance->hot[instance->hand++ % TPR_SHM_HOT]);
    conn->hot = (int32_t)instance->hot_count;
    instance->hot[instance->hot_count++] = conn;
    tpr_shm_disarm_one(conn);
}

// ---- the socket

// Takes in what lies in the socket: wake-up bytes (0), and bytes that say how many descriptors come with them.
static void tpr_shm_drain(tpr_shm_conn *conn) {
    uint8_t bytes[64];
    tprpc_span span;
    span.data = bytes;
    span.size = sizeof bytes;
    for (int i = 0; i < 4 && conn->status == TPRPC_OK; i++) {
        intptr_t handles[TPR_OS_HANDLES];
        size_t count = TPR_OS_HANDLES, said = 0;
        int64_t n = tpr_os_recv(conn->fd, &span, 1, handles, &count);
        if (n < 0 && errno == EAGAIN) return;
        for (int64_t k = 0; k < n; k++) said += bytes[k];
        if (said == count && conn->handle_count + count <= TPR_SHM_HANDLES) {
            for (size_t k = 0; k < count; k++) conn->handles[conn->handle_count++] = handles[k];
        } else {
            for (size_t k = 0; k < count; k++) tpr_os_close((int)handles[k]);
            if (said > count) tpr_shm_fail(conn, TPRPC_ERROR_LIMIT, EMFILE, "sent descriptors, and none is free here");
            else tpr_shm_fail(conn, TPRPC_ERROR_PROTOCOL, 0, "sent more descriptors than the protocol allows");
        }
        if (n <= 0) tpr_shm_ended(conn, n < 0 ? errno : 0);
        if (count == 0 && n < (int64_t)sizeof bytes) return;   // nothing is left
    }
}

// Sends descriptors ahead of the bytes that they belong to. False: not now, SEND follows.
static bool tpr_shm_send_handles(tpr_shm_conn *conn, const intptr_t *handles, size_t count) {
    uint8_t said = (uint8_t)count;
    tprpc_span span;
    span.data = &said;
    span.size = 1;
    if (conn->handles_sent - TPR_ATOMIC_LOAD(&conn->theirs->taken) + count > TPR_SHM_HANDLES) {
        tpr_shm_want(conn);
        uint32_t untaken = conn->handles_sent - TPR_ATOMIC_LOAD_FULL(&conn->theirs->taken);
        if (untaken > TPR_SHM_HANDLES) tpr_shm_broken(conn);
        if (untaken + count > TPR_SHM_HANDLES) return false;
    }
    if (tpr_os_send(conn->fd, &span, 1, handles, count, false) == 1) {
        conn->handles_sent += (uint32_t)count;
        return true;
    }
    if (errno == EPIPE || errno == ECONNRESET) {
        tpr_shm_ended(conn, errno);
    } else if (errno != EAGAIN) {
        tpr_shm_fail(conn, tpr_base_status_of(errno), errno, "could not be sent descriptors");
    } else {
        tpr_shm_want(conn);
        conn->blocked = true;
        tpr_os_poller_set(conn->instance->poller, conn->fd, TPR_OS_READABLE | TPR_OS_WRITABLE, &conn->watch, true);
    }
    return false;
}

// ---- connections

static tpr_shm_conn *tpr_shm_conn_new(tpr_shm_instance *instance, tpr_shm_state state, tprpc_conn_owner *owner,
                                      int fd) {
    tpr_shm_conn *conn = (tpr_shm_conn *)tpr_shm_new(instance, sizeof *conn);
    if (!conn) return NULL;
    conn->instance = instance;
    conn->owner = owner;
    conn->state = state;
    conn->fd = fd;
    conn->memfd = -1;
    conn->hot = -1;
    conn->watch.kind = TPR_SHM_IS_CONN;
    tpr_base_list_init(&conn->ripe);
    tpr_base_list_init(&conn->node);
    tpr_base_list_init(&conn->written);
    conn->process.ended = tpr_shm_process_ended;
    conn->deadline_us = tpr_loop_clock(instance->loop) + TPR_SHM_HANDSHAKE_US;
    return conn;
}

TPR_COLD static void tpr_shm_conn_free(tpr_shm_conn *conn) {
    tpr_shm_instance *instance = conn->instance;
    if (conn->listener) instance->handshake_count--;
    tpr_shm_cool(conn);
    tpr_base_list_remove(&conn->ripe);
    tpr_base_list_remove(&conn->node);
    tpr_timer_cancel(&instance->loop->wheel, &conn->timer);
    tpr_process_unwatch(&conn->process);
    if (conn->shared) TPR_ATOMIC_STORE(&conn->mine->gone, 1u);
    tpr_os_unmap(conn->shared, conn->shared_size);
    tpr_base_discharge(&instance->ctx->env.memory, conn->charged);
    tpr_base_list_remove(&conn->written);
    if (conn->fd >= 0) {
        tpr_os_poller_remove(instance->poller, conn->fd);
        tpr_os_shutdown(conn->fd);
    }
    tpr_os_close(conn->fd);
    tpr_os_close(conn->memfd);
    for (uint32_t i = 0; i < conn->handle_count; i++) tpr_os_close((int)conn->handles[i]);
    tpr_shm_bury(instance, &conn->watch);
}

// Maps the rings, `ring` bytes each. first: as the connector.
static bool tpr_shm_map(tpr_shm_conn *conn, int memfd, size_t ring, bool first) {
    conn->shared_size = sizeof(tpr_shm_shared) + 2 * ring;
    conn->shared = (tpr_shm_shared *)tpr_os_map(memfd, conn->shared_size);
    if (!conn->shared) return false;
    uint8_t *rings = (uint8_t *)(conn->shared + 1);
    conn->mask = ring - 1;
    conn->mine = &conn->shared->ends[first ? 0 : 1];
    conn->theirs = &conn->shared->ends[first ? 1 : 0];
    conn->tx = rings + (first ? 0 : ring);
    conn->rx = rings + (first ? ring : 0);
    return true;
}

static void tpr_shm_open_now(tpr_shm_conn *conn) {
    conn->state = TPR_SHM_OPEN;
    tpr_timer_cancel(&conn->instance->loop->wheel, &conn->timer);
    tpr_shm_process_watch(conn);
    tpr_shm_heat(conn);
}

TPR_COLD static void tpr_shm_peer_text(const tpr_shm_conn *conn, char *out, size_t size) {
    if (conn->pid > 0) snprintf(out, size, "process %d", (int)conn->pid);
    else if (conn->name[0]) snprintf(out, size, "shm://%.40s", conn->name);
    else snprintf(out, size, "a process of another pid namespace");
}

TPR_COLD static void tpr_shm_say_lost(tpr_shm_conn *conn) {
    char peer[64];
    tprpc_error error;
    conn->lost = true;
    tpr_base_list_remove(&conn->ripe);
    if (!conn->owner) {                // nobody knows of it yet
        tpr_shm_conn_free(conn);
        return;
    }
    tpr_shm_peer_text(conn, peer, sizeof peer);
    tprpc_error_set(&error, conn->status, conn->os_code, "shm: %s %s", peer, conn->why);
    conn->owner->event(conn->owner, TPRPC_EVENT_LOST, &error);
}

// Tells the owner what there is to tell. Returns whether there was anything.
static bool tpr_shm_report(tpr_shm_conn *conn) {
    uint32_t events = conn->opened ? (uint32_t)TPRPC_EVENT_OPEN : 0u;
    bool open = conn->state == TPR_SHM_OPEN;
    if (open && tpr_shm_has_data(conn)) events |= TPRPC_EVENT_RECV;
    if (open && conn->wants && conn->status == TPRPC_OK && tpr_shm_may_send(conn)) {
        tpr_shm_want_no_more(conn);
        events |= TPRPC_EVENT_SEND;
    }
    if (TPR_LIKELY(events)) {
        uint64_t pos = conn->rx_pos;
        uint32_t used = conn->rx_used;
        conn->opened = false;
        conn->active = conn->instance->turn;
        conn->owner->event(conn->owner, events, NULL);
        if (TPR_LIKELY(conn->watch.closed || conn->status == TPRPC_OK)) return true;
        if ((pos != conn->rx_pos || used != conn->rx_used) && tpr_shm_has_data(conn)) {   // more of it in the next turn
            tpr_shm_ripen(conn);
            return true;
        }
    }
    if (TPR_LIKELY(conn->status == TPRPC_OK)) return false;
    tpr_shm_say_lost(conn);
    return true;
}

// ---- handshake

static void tpr_shm_connect_now(tpr_shm_conn *conn);

TPR_COLD static void tpr_shm_timer(tprpc_work *work) {
    tpr_shm_conn *conn = TPR_CONTAINER(work, tpr_shm_conn, timer);
    if (tpr_loop_clock(conn->instance->loop) >= conn->deadline_us) {
        tpr_shm_fail(conn, TPRPC_ERROR_TIMEOUT, 0, conn->state == TPR_SHM_CONNECTING ? "accepts no connection"
                                                                                      : "did not answer");
    } else {
        tpr_shm_connect_now(conn);
    }
}

TPR_COLD static void tpr_shm_set_timer(tpr_shm_conn *conn, int64_t due_us) {
    conn->timer.run = tpr_shm_timer;
    tpr_loop_timer(conn->instance->loop, &conn->timer, due_us < conn->deadline_us ? due_us : conn->deadline_us);
}

// Both ends: whether the peer is this user.
TPR_COLD static bool tpr_shm_trusted(int fd, int32_t *pid, uint32_t *user) {
    return tpr_os_credentials(fd, pid, user) == 0 && *user == tpr_os_user();
}

// Connects, or sets a timer to try again, and says hello with the memory.
TPR_COLD static void tpr_shm_connect_now(tpr_shm_conn *conn) {
    tpr_shm_instance *instance = conn->instance;
    tpr_os_address address;
    uint8_t hello[TPR_SHM_HELLO] = TPR_ZERO;
    uint32_t user = 0;
    tprpc_span span;
    intptr_t handle = conn->memfd;
    if (tpr_os_unix_address(conn->name, &address) != 0 || tpr_os_connect(conn->fd, &address) != 0) {
        int code = errno;
        if (code == EAGAIN || code == EINPROGRESS)
            tpr_shm_set_timer(conn, tpr_loop_clock(instance->loop) + TPR_SHM_RETRY_US);
        else tpr_shm_fail(conn, tpr_base_status_of(code), code, "cannot be connected to");
        return;
    }
    conn->state = TPR_SHM_ASKING;
    if (!tpr_shm_trusted(conn->fd, &conn->pid, &user)) {
        tpr_shm_fail(conn, TPRPC_ERROR_DENIED, 0, "is not this user's");
        return;
    }
    tpr_wire_writer w = tpr_wire_writer_of(hello, sizeof hello);
    tpr_wire_write_u32(&w, TPR_SHM_MAGIC);
    tpr_wire_write_u32(&w, TPR_SHM_VERSION);
    tpr_wire_write_u32(&w, TPR_SHM_RING);
    span.data = hello;
    span.size = sizeof hello;
    if (tpr_os_poller_set(instance->poller, conn->fd, TPR_OS_READABLE, &conn->watch, false) != 0 ||
        tpr_os_send(conn->fd, &span, 1, &handle, 1, false) != TPR_SHM_HELLO) {
        tpr_shm_fail(conn, tpr_base_status_of(errno), errno, "could not be sent the shared memory");
        return;
    }
    tpr_os_close(conn->memfd);
    conn->memfd = -1;
    tpr_shm_set_timer(conn, conn->deadline_us);
    tpr_shm_process_watch(conn);       // from here on: its child may hold the listening socket, which nobody serves
}

// The connector's side of the answer: one byte, a status.
static void tpr_shm_answered(tpr_shm_conn *conn) {
    uint8_t answer = 0;
    tprpc_span span;
    span.data = &answer;
    span.size = 1;
    int64_t n = tpr_os_recv(conn->fd, &span, 1, NULL, NULL);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        tpr_shm_ended(conn, n < 0 ? errno : 0);
    } else if (answer == TPRPC_OK) {
        conn->opened = true;
        tpr_shm_open_now(conn);
        tpr_shm_ripen(conn);
    } else if (answer == TPRPC_ERROR_DENIED) {
        tpr_shm_fail(conn, TPRPC_ERROR_DENIED, 0, "refused this user");
    } else if (answer == TPRPC_ERROR_LIMIT || answer == TPRPC_ERROR_MEMORY) {
        tpr_shm_fail(conn, TPRPC_ERROR_LIMIT, 0, "has no room for another connection");
    } else {
        tpr_shm_fail(conn, TPRPC_ERROR_PROTOCOL, 0, "refused the shared memory");
    }
}

// Ends an incoming connection, with the reason for its peer.
static void tpr_shm_refuse(int fd, tprpc_status status) {
    uint8_t answer = (uint8_t)status;
    tprpc_span span;
    span.data = &answer;
    span.size = 1;
    (void)tpr_os_send(fd, &span, 1, NULL, 0, false);
}

// Reads hello and maps what came with it. PENDING: it has not come whole.
static tprpc_status tpr_shm_read_hello(tpr_shm_conn *conn) {
    intptr_t handles[TPR_OS_HANDLES];
    size_t count = TPR_OS_HANDLES;
    tprpc_span span;
    span.data = conn->hello + conn->hello_have;
    span.size = TPR_SHM_HELLO - conn->hello_have;
    int64_t n = tpr_os_recv(conn->fd, &span, 1, handles, &count);
    if (n < 0 && errno == EAGAIN) return TPRPC_PENDING;
    for (size_t i = 0; i < count && n > 0; i++) {
        if (i == 0 && conn->memfd < 0) conn->memfd = (int)handles[i];
        else tpr_os_close((int)handles[i]);
    }
    if (n <= 0) return TPRPC_ERROR_PEER;
    conn->hello_have += (uint32_t)n;
    if (conn->hello_have < TPR_SHM_HELLO) return TPRPC_PENDING;
    tpr_wire_reader r = tpr_wire_reader_of(conn->hello, TPR_SHM_HELLO);
    uint32_t magic = tpr_wire_read_u32(&r), version = tpr_wire_read_u32(&r), ring = tpr_wire_read_u32(&r);
    if (magic != TPR_SHM_MAGIC || version != TPR_SHM_VERSION || ring < TPR_SHM_RING_LEAST || ring > TPR_SHM_RING_MOST ||
        (ring & (ring - 1)) != 0) return TPRPC_ERROR_PROTOCOL;
    if (conn->memfd < 0) return TPRPC_ERROR_LIMIT;   // it was sent, or it is not ours: no descriptor was free here
    if (tpr_os_memfd_check(conn->memfd, sizeof(tpr_shm_shared) + 2 * (size_t)ring) != 0) return TPRPC_ERROR_PROTOCOL;
    return tpr_shm_map(conn, conn->memfd, ring, false) ? TPRPC_OK : TPRPC_ERROR_MEMORY;
}

// The acceptor's side: hello is taken in, answered, and the connection handed over.
static void tpr_shm_asked(tpr_shm_conn *conn) {
    uint8_t answer = TPRPC_OK;
    tprpc_span span;
    tpr_shm_listener *listener = conn->listener;
    span.data = &answer;
    span.size = 1;
    tprpc_status status = tpr_shm_read_hello(conn);
    if (status == TPRPC_PENDING) return;
    if (status == TPRPC_OK && tpr_os_send(conn->fd, &span, 1, NULL, 0, false) != 1) status = TPRPC_ERROR_PEER;
    if (status != TPRPC_OK) {
        TPR_LOG(&conn->instance->ctx->env.logger, TPRPC_LOG_WARNING, "shm", listener->name,
                "the handshake of process %d failed: %s", (int)conn->pid, tprpc_status_name(status));
        tpr_shm_refuse(conn->fd, status);
        tpr_shm_conn_free(conn);
        return;
    }
    tpr_os_close(conn->memfd);
    conn->memfd = -1;
    conn->listener = NULL;
    conn->instance->handshake_count--;
    tpr_base_list_remove(&conn->node);
    tpr_shm_open_now(conn);
    listener->owner->accepted(listener->owner, conn);
}

// ---- listeners

TPR_COLD static void tpr_shm_unpause(tprpc_work *work) {
    tpr_shm_listener *listener = TPR_CONTAINER(work, tpr_shm_listener, timer);
    if (tpr_os_poller_set(listener->instance->poller, listener->fd, TPR_OS_READABLE, &listener->watch, false) != 0)
        tpr_loop_timer(listener->instance->loop, work, tpr_loop_clock(listener->instance->loop) + TPR_SHM_PAUSE_US);
}

// What waits in the queue would wake the loop for ever where there is no descriptor to accept it with.
static void tpr_shm_pause(tpr_shm_listener *listener) {
    tpr_shm_instance *instance = listener->instance;
    TPR_LOG(&instance->ctx->env.logger, TPRPC_LOG_WARNING, "shm", listener->name, "cannot accept: %s", strerror(errno));
    tpr_os_poller_remove(instance->poller, listener->fd);
    listener->timer.run = tpr_shm_unpause;
    tpr_loop_timer(instance->loop, &listener->timer, tpr_loop_clock(instance->loop) + TPR_SHM_PAUSE_US);
}

// The connection that has said nothing for longest makes room: who says nothing keeps nobody out.
TPR_COLD static void tpr_shm_drop_silent(tpr_shm_instance *instance) {
    if (tpr_base_list_empty(&instance->handshakes)) return;
    tpr_shm_conn *oldest = TPR_CONTAINER(instance->handshakes.next, tpr_shm_conn, node);
    TPR_LOG(&instance->ctx->env.logger, TPRPC_LOG_WARNING, "shm", oldest->listener->name,
            "process %d is dropped, too many connections say nothing", (int)oldest->pid);
    tpr_shm_refuse(oldest->fd, TPRPC_ERROR_LIMIT);
    tpr_shm_conn_free(oldest);
}

// Returns false when no further connection can be accepted now.
static bool tpr_shm_accept_one(tpr_shm_listener *listener) {
    tpr_shm_instance *instance = listener->instance;
    tprpc_status status = TPRPC_ERROR_DENIED;
    tpr_shm_conn *conn = NULL;
    int32_t pid = 0;
    uint32_t user = 0;
    int fd = tpr_os_accept(listener->fd);
    if (fd < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) tpr_shm_pause(listener);
        return false;
    }
    if (tpr_shm_trusted(fd, &pid, &user)) {
        status = TPRPC_ERROR_LIMIT;
        if (instance->handshake_count >= instance->ctx->limits.handshakes) tpr_shm_drop_silent(instance);
        if (instance->handshake_count < instance->ctx->limits.handshakes)
            conn = tpr_shm_conn_new(instance, TPR_SHM_ASKED, NULL, fd);
        if (conn && tpr_os_poller_set(instance->poller, fd, TPR_OS_READABLE, &conn->watch, false) == 0)
            status = TPRPC_OK;
    }
    if (status != TPRPC_OK) {
        TPR_LOG(&instance->ctx->env.logger, TPRPC_LOG_WARNING, "shm", listener->name,
                "process %d of user %u is refused: %s", (int)pid, (unsigned)user, tprpc_status_name(status));
        tpr_shm_refuse(fd, status);
        if (conn) tpr_shm_conn_free(conn);
        else tpr_os_close(fd);
        return true;
    }
    conn->pid = pid;
    conn->listener = listener;
    instance->handshake_count++;
    tpr_base_list_add(&instance->handshakes, &conn->node);
    tpr_shm_set_timer(conn, conn->deadline_us);
    return true;
}

// ---- progress

static void tpr_shm_conn_ready(tpr_shm_conn *conn, uint32_t events) {
    switch (conn->state) {
    case TPR_SHM_CONNECTING: break;
    case TPR_SHM_ASKING: tpr_shm_answered(conn); break;
    case TPR_SHM_ASKED: tpr_shm_asked(conn); break;
    case TPR_SHM_OPEN:
        if ((events & TPR_OS_WRITABLE) && conn->blocked) {
            conn->blocked = false;
            tpr_os_poller_set(conn->instance->poller, conn->fd, TPR_OS_READABLE, &conn->watch, true);
        }
        if (events & (TPR_OS_READABLE | TPR_OS_HANGUP)) tpr_shm_drain(conn);
        tpr_shm_heat(conn);
        break;
    }
}

// Looks at the sockets.
TPR_COLD static bool tpr_shm_look(tpr_shm_instance *instance) {
    tpr_os_event events[TPR_SHM_EVENTS];
    int n = tpr_os_poller_wait(instance->poller, events, TPR_SHM_EVENTS, 0);
    for (int i = 0; i < n; i++) {
        tpr_shm_watch *watch = (tpr_shm_watch *)events[i].user;
        if (watch->closed) continue;
        switch (watch->kind) {
        case TPR_SHM_IS_CONN: tpr_shm_conn_ready(TPR_CONTAINER(watch, tpr_shm_conn, watch), events[i].events); break;
        case TPR_SHM_IS_LISTENER:
            for (int k = 0; k < 16 && !watch->closed && tpr_shm_accept_one((tpr_shm_listener *)(void *)watch); k++) {}
            break;
        }
    }
    return n > 0;
}

// Reports those that have something to report; what ripens meanwhile waits for the next turn.
static void tpr_shm_report_ripe(tpr_shm_instance *instance) {
    tpr_base_list now;
    now.next = instance->ripe.next;
    now.prev = instance->ripe.prev;
    now.next->prev = now.prev->next = &now;
    tpr_base_list_init(&instance->ripe);
    while (!tpr_base_list_empty(&now)) {
        tpr_shm_conn *conn = TPR_CONTAINER(now.next, tpr_shm_conn, ripe);
        tpr_base_list_remove(&conn->ripe);
        tpr_shm_heat(conn);
        tpr_shm_report(conn);
    }
}

static inline bool tpr_shm_look_is_due(tpr_shm_instance *instance) {
    int64_t since = instance->loop->now_us - instance->looked_us;
    return since >= TPR_SHM_LOOK_US || since < 0;
}

// The rare part of progress.
static bool tpr_shm_progress_slow(tpr_shm_instance *instance) {
    bool did = false;
    if (instance->armed) for (uint32_t i = 0; i < instance->hot_count; i++) tpr_shm_disarm_one(instance->hot[i]);
    if (instance->armed || instance->turn % TPR_SHM_LOOK_TURNS == 0 || tpr_shm_look_is_due(instance)) {
        instance->looked_us = instance->loop->now_us;
        did = tpr_shm_look(instance);
    }
    instance->armed = false;
    if (instance->turn % (2 * TPR_SHM_LOOK_TURNS) == 0) {
        for (uint32_t i = instance->hot_count; i-- > 0;)
            if (instance->turn - instance->hot[i]->active > TPR_SHM_IDLE_TURNS) tpr_shm_put_away(instance->hot[i]);
    }
    if (tpr_base_list_empty(&instance->ripe)) return did;
    tpr_shm_report_ripe(instance);
    return true;
}

// Whether a hot connection has something to report; what is read of it next is fetched into the cache.
static inline bool tpr_shm_is_ready(const tpr_shm_conn *conn) {
    uint64_t at = conn->rx_pos & conn->mask;
    if (TPR_LIKELY(!TPR_ATOMIC_PEEK(tpr_shm_word(conn->rx, at)) && !conn->wants)) return false;
    tpr_atomic_prefetch(conn->rx + ((at + TPR_SHM_LINE) & conn->mask));   // most records have two lines
    return true;
}

// Reports those of the first `count` hot connections that are ready, or everything that may be.
TPR_APART static bool tpr_shm_report_hot(tpr_shm_instance *instance, uint32_t count, bool slow) {
    bool did = false;
    instance->busy = true;
    if (slow) did = tpr_shm_progress_slow(instance);
    for (uint32_t i = slow ? instance->hot_count : count; i-- > 0;) {
        if (TPR_UNLIKELY(i >= instance->hot_count)) continue;   // some were closed in an event
        if (tpr_shm_is_ready(instance->hot[i])) did |= tpr_shm_report(instance->hot[i]);
    }
    instance->busy = false;
    while (TPR_UNLIKELY(!tpr_base_list_empty(&instance->dead))) {
        tpr_shm_watch *watch = TPR_CONTAINER(instance->dead.next, tpr_shm_watch, node);
        tpr_base_list_remove(&watch->node);
        tpr_shm_bury_one(instance, watch);
    }
    return did;
}

// Most calls are a spinner's, which find nothing: they save no register.
static bool tpr_shm_progress(void *self) {
    tpr_shm_instance *instance = (tpr_shm_instance *)self;
    if (TPR_UNLIKELY(++instance->turn % TPR_SHM_LOOK_TURNS == 0 || instance->armed || tpr_shm_look_is_due(instance) ||
                     !tpr_base_list_empty(&instance->ripe))) return tpr_shm_report_hot(instance, 0, true);
    for (uint32_t i = instance->hot_count; i-- > 0;)
        if (tpr_shm_is_ready(instance->hot[i])) return tpr_shm_report_hot(instance, i + 1, false);
    return false;
}

static bool tpr_shm_arm(void *self, int64_t *deadline_us) {
    tpr_shm_instance *instance = (tpr_shm_instance *)self;
    (void)deadline_us;
    if (!tpr_base_list_empty(&instance->ripe)) return false;
    instance->armed = true;
    for (uint32_t i = instance->hot_count; i-- > 0;) {
        tpr_shm_conn *conn = instance->hot[i];
        if (!tpr_shm_arm_one(conn)) return false;
        if (conn->active < instance->armed_turn) tpr_shm_cool(conn);   // did nothing since: stays armed
    }
    instance->armed_turn = instance->turn;
    return tpr_base_list_empty(&instance->ripe);
}

static int32_t tpr_shm_process(void *conn) { return ((const tpr_shm_conn *)conn)->pid; }

static intptr_t tpr_shm_handle(void *self) { return ((tpr_shm_instance *)self)->poller; }

// ---- the table

static void tpr_shm_close(void *self) {
    tpr_shm_instance *instance = (tpr_shm_instance *)self;
    tpr_timer_cancel(&instance->loop->wheel, &instance->trim);
    tpr_os_close(instance->poller);
    tpr_shm_free(instance, instance, sizeof *instance);
}

// What tells whether two processes can reach each other: the boot, the network namespace (which abstract names belong
// to), and the user.
static void tpr_shm_make_domain(tpr_shm_instance *instance) {
    char boot[40];
    tpr_os_boot_id(boot, sizeof boot);
    size_t size = strlen(boot);
    memcpy(instance->domain, boot, size);
    tpr_base_store_le64(instance->domain + size, tpr_os_net_namespace());
    tpr_base_store_le32(instance->domain + size + 8, tpr_os_user());
    instance->domain_size = size + 12;
}

static tprpc_status tpr_shm_open(const tprpc_host *host, void *user, void **out, tprpc_error *error) {
    tprpc_context *ctx = host->context;
    tpr_shm_instance *instance;
    (void)user;
    int fd = tpr_os_memfd("tprpc-probe", sizeof(tpr_shm_shared));
    if (fd < 0) return tpr_base_os_error(error, errno, "shm: creating", "a memfd");
    tpr_os_close(fd);
    fd = tpr_os_socket(AF_UNIX);
    if (fd < 0) return tpr_base_os_error(error, errno, "shm: creating", "an UNIX socket");
    tpr_os_close(fd);
    instance = (tpr_shm_instance *)tpr_base_new(&ctx->env.memory, sizeof *instance, (uint32_t)TPR_SHM_TAG);
    if (!instance) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "shm: no memory for an instance");
    instance->ctx = ctx;
    instance->loop = &ctx->loops[host->loop];
    tpr_base_list_init(&instance->ripe);
    tpr_base_list_init(&instance->dead);
    tpr_base_list_init(&instance->handshakes);
    tpr_base_list_init(&instance->written);
    instance->trim.run = tpr_shm_trim;
    instance->trim.loop = host->loop;
    tpr_shm_make_domain(instance);
    instance->poller = tpr_os_poller();
    if (instance->poller < 0) {
        tpr_base_os_error(error, errno, "shm: creating", "a poller");
        tpr_shm_close(instance);
        return tpr_base_status_of(errno);
    }
    *out = instance;
    return TPRPC_OK;
}

static size_t tpr_shm_domain(void *self, uint8_t *out, size_t capacity) {
    tpr_shm_instance *instance = (tpr_shm_instance *)self;
    size_t size = instance->domain_size < capacity ? instance->domain_size : capacity;
    memcpy(out, instance->domain, size);
    return size;
}

static bool tpr_shm_reaches(void *self, const uint8_t *domain, size_t size) {
    tpr_shm_instance *instance = (tpr_shm_instance *)self;
    return size == instance->domain_size && memcmp(domain, instance->domain, size) == 0;
}

TPR_COLD static void tpr_shm_unlisten(void *handle) {
    tpr_shm_listener *listener = (tpr_shm_listener *)handle;
    tpr_shm_instance *instance = listener->instance;
    for (tpr_base_list *i = instance->handshakes.next, *next; i != &instance->handshakes; i = next) {
        tpr_shm_conn *conn = TPR_CONTAINER(i, tpr_shm_conn, node);
        next = i->next;
        if (conn->listener == listener) tpr_shm_conn_free(conn);
    }
    tpr_timer_cancel(&instance->loop->wheel, &listener->timer);
    if (listener->fd >= 0) tpr_os_poller_remove(instance->poller, listener->fd);
    tpr_os_close(listener->fd);
    tpr_shm_bury(instance, &listener->watch);
}

static tprpc_status tpr_shm_listen(void *self, const char *address, tprpc_listen_owner *owner, void **out,
                                   tprpc_error *error) {
    tpr_shm_instance *instance = (tpr_shm_instance *)self;
    tpr_os_address at;
    uint8_t random[16];
    tpr_shm_listener *listener = (tpr_shm_listener *)tpr_shm_new(instance, sizeof *listener);
    if (!listener) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "shm: no memory for a listener");
    listener->instance = instance;
    listener->owner = owner;
    listener->watch.kind = TPR_SHM_IS_LISTENER;
    listener->fd = -1;
    snprintf(listener->name, sizeof listener->name, "%s", address);
    int code = strlen(address) < sizeof listener->name ? 0 : ENAMETOOLONG;
    if (!address[0]) {
        code = tpr_os_random(random, sizeof random) == 0 ? 0 : errno;
        int n = snprintf(listener->name, sizeof listener->name, "tprpc-");
        for (size_t i = 0; i < sizeof random; i++) snprintf(listener->name + n + 2 * i, 3, "%02x", random[i]);
    }
    if (!code && ((listener->fd = tpr_os_socket(AF_UNIX)) < 0 || tpr_os_unix_address(listener->name, &at) != 0 ||
                  tpr_os_listen(listener->fd, &at) != 0 ||
                  tpr_os_poller_set(instance->poller, listener->fd, TPR_OS_READABLE, &listener->watch, false) != 0))
        code = errno;
    if (code) {
        tprpc_status status = code == ENAMETOOLONG
            ? tprpc_error_set(error, TPRPC_ERROR_INVALID, code, "shm: a name of more than %d bytes: %.40s...",
                              TPR_SHM_NAME - 1, address)
            : tpr_base_os_error(error, code, "shm: listening on", listener->name);
        tpr_shm_unlisten(listener);
        return status;
    }
    *out = listener;
    return TPRPC_OK;
}

static size_t tpr_shm_address(void *handle, char *out, size_t capacity) {
    tpr_shm_listener *listener = (tpr_shm_listener *)handle;
    snprintf(out, capacity, "%s", listener->name);
    return strlen(listener->name);
}

static bool tpr_shm_public_address(void *self, const char *address) {
    (void)self;
    (void)address;
    return false;
}

// Whether there is memory for another connection's rings, which the connector answers for.
TPR_COLD static tprpc_status tpr_shm_charge(tpr_shm_conn *conn, size_t size, tprpc_error *error) {
    tpr_shm_instance *instance = conn->instance;
    const int64_t now = tpr_loop_clock(instance->loop);
    if (!instance->left_us || (uint64_t)(now - instance->left_us) >= TPR_SHM_LEFT_US) {
        instance->left = tpr_os_memory_left();
        instance->left_us = now;
    }
    if (instance->left < size + TPR_SHM_LEFT_LEAST)
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0,
                               "shm: the control group leaves %llu bytes of memory, a connection may take %zu",
                               (unsigned long long)instance->left, size);
    if (!tpr_base_charge(&instance->ctx->env.memory, size))
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0,
                               "shm: %zu bytes for a connection are over limits.memory_bytes", size);
    conn->charged = size;
    if (instance->left != UINT64_MAX) instance->left -= size;
    return TPRPC_OK;
}

static tprpc_status tpr_shm_connect(void *self, const char *address, uint32_t lane, tprpc_conn_owner *owner, void **out,
                                    tprpc_error *error) {
    const size_t size = sizeof(tpr_shm_shared) + 2 * (size_t)TPR_SHM_RING;
    tpr_shm_instance *instance = (tpr_shm_instance *)self;
    tpr_shm_conn *conn = tpr_shm_conn_new(instance, TPR_SHM_CONNECTING, owner, -1);
    char peer[64];
    (void)lane;
    if (!conn) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "shm: no memory for a connection");
    if (!address[0] || strlen(address) >= sizeof conn->name) {
        tpr_shm_conn_free(conn);
        return address[0] ? tprpc_error_set(error, TPRPC_ERROR_INVALID, ENAMETOOLONG,
                                            "shm: a name of more than %d bytes: %.40s...", TPR_SHM_NAME - 1, address)
                          : tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "shm: an address without a name");
    }
    tprpc_status charged = tpr_shm_charge(conn, size, error);
    if (charged != TPRPC_OK) {
        tpr_shm_conn_free(conn);
        return charged;
    }
    memcpy(conn->name, address, strlen(address) + 1);
    conn->fd = tpr_os_socket(AF_UNIX);
    if (conn->fd >= 0) conn->memfd = tpr_os_memfd("tprpc-shm", size);
    if (conn->memfd < 0 || !tpr_shm_map(conn, conn->memfd, TPR_SHM_RING, true)) {
        int code = errno;
        tpr_shm_peer_text(conn, peer, sizeof peer);
        tpr_shm_conn_free(conn);
        return tpr_base_os_error(error, code, "shm: sharing memory with", peer);
    }
    tpr_shm_connect_now(conn);
    if (conn->status != TPRPC_OK) {
        tprpc_status status = conn->status;
        tpr_shm_peer_text(conn, peer, sizeof peer);
        tprpc_error_set(error, status, conn->os_code, "shm: %s %s", peer, conn->why);
        tpr_shm_conn_free(conn);
        return status;
    }
    *out = conn;
    return TPRPC_OK;
}

static void tpr_shm_own(void *handle, tprpc_conn_owner *owner) { ((tpr_shm_conn *)handle)->owner = owner; }

// Whether a record of that size goes into the ring as it is.
static inline bool tpr_shm_is_plain(const tpr_shm_conn *conn, size_t size) {
    uint64_t need = tpr_shm_record(size);
    return size - 1 < (size_t)TPR_SHM_WHOLE && conn->hot >= 0 && conn->status == TPRPC_OK &&
           need <= conn->mask + 1 - (conn->tx_pos & conn->mask) && need <= tpr_shm_room(conn);
}

static size_t tpr_shm_send(void *handle, const tprpc_span *spans, size_t count, const intptr_t *handles,
                           size_t handle_count, bool more) {
    tpr_shm_conn *conn = (tpr_shm_conn *)handle;
    size_t total = 0, done = 0;
    tpr_shm_cursor from;
    from.span = spans;
    from.used = 0;
    for (size_t i = 0; i < count; i++) total += spans[i].size;
    if (TPR_LIKELY(tpr_shm_is_plain(conn, total) && !handle_count)) {
        conn->active = conn->instance->turn;
        tpr_shm_put(conn, &from, total, more);
        return total;
    }
    if (TPR_UNLIKELY(conn->status != TPRPC_OK)) return total;
    if (TPR_UNLIKELY(conn->state != TPR_SHM_OPEN)) {
        conn->wants = true;
        return 0;
    }
    if (TPR_UNLIKELY(conn->hot < 0) && !conn->instance->armed) tpr_shm_heat(conn);
    conn->active = conn->instance->turn;
    while (done < total) {
        size_t size = tpr_shm_fit(conn, total - done);
        if (TPR_UNLIKELY(!size)) {
            if (!tpr_shm_full(conn, total - done)) break;
            continue;
        }
        if (TPR_UNLIKELY(handle_count)) {
            if (!tpr_shm_send_handles(conn, handles, handle_count)) break;
            handle_count = 0;
        }
        done += size;
        tpr_shm_put(conn, &from, size, (more || done < total) && size <= TPR_SHM_WHOLE);
    }
    return TPR_UNLIKELY(conn->status != TPRPC_OK) ? total : done;
}

static tprpc_span tpr_shm_peek(void *handle) {
    tpr_shm_conn *conn = (tpr_shm_conn *)handle;
    tprpc_span span = {NULL, 0};
    if (TPR_UNLIKELY(conn->state != TPR_SHM_OPEN) || !tpr_shm_has_data(conn)) return span;
    span.data = conn->rx + (conn->rx_pos & conn->mask) + TPR_SHM_WORD + conn->rx_used;
    span.size = conn->rx_size - conn->rx_used;
    return span;
}

static void tpr_shm_consume(void *handle, size_t size) {
    tpr_shm_conn *conn = (tpr_shm_conn *)handle;
    TPRPC_ASSERT(size <= conn->rx_size - conn->rx_used);
    if (size) tpr_shm_advance(conn, (uint32_t)size);
}

static size_t tpr_shm_recv(void *handle, const tprpc_span *spans, size_t count) {
    size_t done = 0;
    for (size_t i = 0; i < count; i++) {
        for (size_t used = 0; used < spans[i].size;) {
            tprpc_span have = tpr_shm_peek(handle);
            size_t n = have.size < spans[i].size - used ? have.size : spans[i].size - used;
            if (!n) return done;
            memcpy((uint8_t *)spans[i].data + used, have.data, n);
            tpr_shm_advance((tpr_shm_conn *)handle, (uint32_t)n);
            used += n;
            done += n;
        }
    }
    return done;
}

TPR_COLD static size_t tpr_shm_take_handles(void *handle, intptr_t *out, size_t capacity) {
    tpr_shm_conn *conn = (tpr_shm_conn *)handle;
    if (conn->handle_count < capacity && conn->state == TPR_SHM_OPEN) tpr_shm_drain(conn);
    size_t n = conn->handle_count < capacity ? conn->handle_count : capacity;
    for (size_t i = 0; i < n; i++) out[i] = conn->handles[i];
    conn->handle_count -= (uint32_t)n;
    for (size_t i = 0; i < conn->handle_count; i++) conn->handles[i] = conn->handles[i + n];
    if (n) {
        conn->handles_taken += (uint32_t)n;
        TPR_ATOMIC_STORE_FULL(&conn->mine->taken, conn->handles_taken);
        tpr_shm_wake_writer(conn);
    }
    return n;
}

TPR_COLD static size_t tpr_shm_peer(void *handle, char *out, size_t capacity) {
    tpr_shm_peer_text((tpr_shm_conn *)handle, out, capacity);
    return strlen(out);
}

static tprpc_status tpr_shm_check_peer(void *handle, tprpc_error *error) {
    (void)handle;                      // the handshake did
    (void)error;
    return TPRPC_OK;
}

static void tpr_shm_disconnect(void *handle, tprpc_status cause) {
    (void)cause;
    tpr_shm_conn_free((tpr_shm_conn *)handle);
}

static const tprpc_transport_table tpr_shm_table = {
    (uint32_t)sizeof(tprpc_transport_table),
    TPRPC_TRANSPORT_HANDLES | TPRPC_TRANSPORT_SAME_HOST | TPRPC_TRANSPORT_LOCAL_COPY | TPRPC_TRANSPORT_REPEATS |
        TPRPC_TRANSPORT_LANES,
    tpr_shm_open, tpr_shm_close, tpr_shm_domain, tpr_shm_reaches, tpr_shm_progress, tpr_shm_arm, tpr_shm_handle,
    tpr_shm_listen, tpr_shm_address, tpr_shm_unlisten, tpr_shm_public_address, tpr_shm_connect, tpr_shm_own,
    tpr_shm_send, tpr_shm_peek, tpr_shm_consume, tpr_shm_recv, tpr_shm_take_handles, tpr_shm_peer, tpr_shm_check_peer,
    tpr_shm_process, tpr_shm_disconnect
};

static const tprpc_backend tpr_shm_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "shm",
    "Rings in memory that two processes of one user share, with an UNIX socket for descriptors and wake-ups.", 200,
    &tpr_shm_table, NULL, NULL, NULL
};

#endif // TPRPC_NO_SHM

// >>channel -----------------------------------------------------------------------------------------------------------
// What stands between channels and whoever uses them: the link to the twin and the end of a transfer. The interface
// itself, tprpc_channel_table, stands in the public part.
//
// Uses: atomic, os, base, timer, loop, context.
// Invariant: a transfer ends once: `done` is cleared before it is called.

enum { TPR_CHANNEL_DESCRIPTOR = 4096 };   // the most bytes of a channel's own in a message

typedef struct tpr_channel_transfer tpr_channel_transfer;
struct tpr_channel_transfer {
    tprpc_transfer base;             // first, so that it is what a channel sees
    void (*done)(tpr_channel_transfer *transfer, tprpc_status status, const tprpc_error *error);
    uint32_t loop;                   // the one it is on
};

struct tprpc_link {                  // what a pipe offers to the end of a channel
    tprpc_status (*control)(tprpc_link *link, const void *bytes, size_t size, const intptr_t *handles, size_t count);
    tprpc_status (*bulk)(tprpc_link *link, uint64_t transfer, uint64_t offset, const void *data, size_t size,
                         tprpc_work *taken);
    int32_t      (*process)(tprpc_link *link);
    uint32_t     (*transport)(tprpc_link *link);
    uint64_t     fallbacks;          // counted by the channel
};

// ---- public

TPRPC_API tprpc_status tprpc_link_control(tprpc_link *link, const void *bytes, size_t size, const intptr_t *handles,
                                          size_t handle_count) {
    TPRPC_ASSERT(link && (bytes || !size) && (handles || !handle_count));
    if (!link || (!bytes && size) || (!handles && handle_count)) return TPRPC_ERROR_INVALID;
    if (size > 4096 || handle_count > TPR_OS_HANDLES) return TPRPC_ERROR_LIMIT;
    if (handle_count && !tprpc_link_handles(link)) return TPRPC_ERROR_UNSUPPORTED;
    return link->control(link, bytes, size, handles, handle_count);
}

TPRPC_API tprpc_status tprpc_link_bulk(tprpc_link *link, uint64_t transfer, uint64_t offset, const void *data,
                                       size_t size, tprpc_work *taken) {
    TPRPC_ASSERT(link && taken && taken->run && (data || !size));
    if (!link || !taken || !taken->run || (!data && size)) return TPRPC_ERROR_INVALID;
    return link->bulk(link, transfer, offset, data, size, taken);
}

TPRPC_API void tprpc_transfer_done(tprpc_transfer *transfer, tprpc_status status, const tprpc_error *error) {
    tpr_channel_transfer *self = (tpr_channel_transfer *)(void *)transfer;
    void (*done)(tpr_channel_transfer *, tprpc_status, const tprpc_error *) = self ? self->done : NULL;
    TPRPC_ASSERT(done);   // none, or ended twice
    if (!done) return;
    self->done = NULL;
    done(self, status, error);
}

TPRPC_API bool tprpc_link_handles(tprpc_link *link) {
    TPRPC_ASSERT(link);
    return link && (link->transport(link) & TPRPC_TRANSPORT_HANDLES) != 0;
}

TPRPC_API uint32_t tprpc_link_transport(tprpc_link *link) {
    TPRPC_ASSERT(link);
    return link ? link->transport(link) : 0;
}

TPRPC_API int32_t tprpc_link_process(tprpc_link *link) {
    TPRPC_ASSERT(link);
    return link ? link->process(link) : 0;
}

// >>batch -------------------------------------------------------------------------------------------------------------
// What the channels for host memory have in common: a batch of buffers, which the receiver fetches chunk by chunk, on
// several loops of its context where it is large, or asks to be sent through the pipe.
//
// Uses: atomic, os, base, timer, loop, context, channel.
// Invariant: a batch is in `sends` or `receives` of its end from its beginning to its end; a message of the twin about
// one that is not there is about one that has ended, and is dropped. A receive ends when all its workers have come back
// or cannot begin any more, a send when neither the link nor a receiver of this process is at its memory. Of an end's
// large batches one at a time has chunks left to take, the oldest.

enum {
    TPR_BATCH_CHUNK = 256 << 10,      // bytes fetched in one go,
    TPR_BATCH_LEAST = 1 << 10,        // and what fewer count as
    TPR_BATCH_PIECES = TPR_OS_SPANS - 1,   // buffers in one go
    TPR_BATCH_SPREAD = 2 << 20,       // bytes from which other loops help
    TPR_BATCH_HELPERS = 3
};

// Control: kind, 7 bytes of 0, transfer id. READY, DROP and DONE come from the receiver, CANCEL from the sender.
enum {
    TPR_BATCH_READY = 1,              // send the bytes through the pipe
    TPR_BATCH_CANCEL = 2,             // nothing more will come
    TPR_BATCH_DROP = 3,               // nothing more is wanted
    TPR_BATCH_DONE = 4                // all was fetched
};

typedef enum tpr_batch_outcome {      // of a fetch
    TPR_BATCH_FETCHED,
    TPR_BATCH_GONE,                   // the sender has taken its memory back, or died
    TPR_BATCH_UNREADABLE,             // its memory cannot be read: it is to send it
    TPR_BATCH_STOPPED                 // this end wants no more
} tpr_batch_outcome;

typedef struct tpr_batch tpr_batch;
typedef struct tpr_batch_piece { size_t buffer, offset, size; } tpr_batch_piece;   // never empty

typedef struct tpr_batch_method {     // what a channel does in its own way; NULL: nothing
    const char *name;
    // Fetches pieces of the sender's buffers into those of the same number. Any thread. NULL: all is sent.
    tpr_batch_outcome (*fetch)(tpr_batch *receive, const tpr_batch_piece *pieces, size_t count);
    // A receive begins, with the sender's word; false: it cannot fetch. confirm: whether what was fetched is right.
    bool              (*find)(tpr_batch *receive, const uint8_t *descriptor, size_t size);
    tpr_batch_outcome (*confirm)(tpr_batch *receive);
    // A send begins, with a word for the receiver; it is over, unless a receiver is at it, which then defers `back`.
    size_t            (*offer)(tpr_batch *send, uint8_t *descriptor);
    bool              (*withdraw)(tpr_batch *send);
} tpr_batch_method;

typedef struct tpr_batch_queue {      // an instance: the workers on a loop, which share a chunk in a turn
    const tpr_batch_method *method;
    const tprpc_host *host;
    tpr_base_list     workers;        // in turn
    tprpc_work        work;
    bool              posted;
} tpr_batch_queue;

typedef struct tpr_batch_end {
    tpr_batch_queue *queue;
    tprpc_link      *link;
    tpr_os_lock      lock;            // for `sends`, at which receivers of this process may look
    tpr_base_map     sends, receives; // by id
    tpr_base_list    waiting;         // to be fetched, the oldest first
    tpr_batch       *first;           // that has chunks left to take; a small one need not be first
} tpr_batch_end;

enum { TPR_BATCH_CALLED, TPR_BATCH_AT_WORK, TPR_BATCH_REVOKED };
typedef struct tpr_batch_worker {     // fetches chunks of a receive, on one loop
    tpr_base_list    node;            // of the queue
    tpr_batch_queue *queue;           // of its loop
    tpr_batch       *batch;           // that of a helper which was revoked may be gone
    size_t           buffer;          // where the last chunk ended, and
    uint64_t         before;          // how many bytes lie before that buffer
    tprpc_work       work;            // of a helper: brings it to its loop, and back
    uint32_t         state;           // of a helper; atomic. Only who is at work may touch the batch.
} tpr_batch_worker;

struct tpr_batch {
    tpr_batch_end  *end;
    tprpc_transfer *transfer;
    tprpc_buffer   *buffers;          // `count` of them, and
    uint64_t       *table;            // count + 2 numbers of the method's, in this block
    size_t          count, pushed;    // buffers; those given to the link
    uint64_t        total, moved;     // bytes; of those that go through the pipe, how many have come or were given
    uint64_t        next;             // atomic: the first byte that no worker has taken
    uint32_t        outcome;          // atomic: tpr_batch_outcome, the first that was not good
    uint32_t        workers;          // that have not come back; 0: nothing is being fetched
    uint32_t        readers;          // of a send, under the end's lock: those of this process, and
    bool            withdrawn;        // that none may begin any more
    bool            sending, lent;    // lent: `back` will come
    bool            over;             // of a send: it ends
    bool            asked, lost;      // of a receive: READY was said; its link is lost
    tprpc_status    status;           // of one that is over, or was aborted
    tprpc_work      back;             // the link has taken a piece, or the last reader has gone
    tpr_batch_worker  own;
    tpr_batch_worker *helpers[TPR_BATCH_HELPERS];
};

static tpr_loop *tpr_batch_loop(const tpr_batch_end *end) {
    return &end->queue->host->context->loops[end->queue->host->loop];
}

static size_t tpr_batch_size(size_t count) {
    return sizeof(tpr_batch) + count * sizeof(tprpc_buffer) + (count + 2) * sizeof(uint64_t);
}

static void tpr_batch_say(tpr_batch_end *end, uint8_t kind, uint64_t id) {
    uint8_t bytes[16] = TPR_ZERO;
    bytes[0] = kind;
    tpr_base_store_le64(bytes + 8, id);
    tprpc_link_control(end->link, bytes, sizeof bytes, NULL, 0);   // a link that refuses has failed and aborts all
}

// ---- beginning and end

static tprpc_status tpr_batch_begin(tpr_batch_end *end, tprpc_transfer *transfer, const tprpc_buffer *buffers,
                                    size_t count, bool sending, tpr_batch **out, tprpc_error *error) {
    tpr_base_map *map = sending ? &end->sends : &end->receives;
    const char *name = end->queue->method->name;
    if (tpr_base_map_get(map, transfer->id))
        return tprpc_error_set(error, TPRPC_ERROR_PROTOCOL, 0, "%s: the peer began a transfer twice", name);
    tpr_base_pool *pool = &tpr_batch_loop(end)->pool;
    tpr_batch *self = (tpr_batch *)tpr_base_pool_alloc(pool, tpr_batch_size(count));
    if (self) {
        memset(self, 0, sizeof *self);
        self->end = end;
        self->transfer = transfer;
        self->sending = sending;
        self->buffers = (tprpc_buffer *)(void *)(self + 1);
        self->table = (uint64_t *)(void *)(self->buffers + count);
        self->count = count;
        tpr_base_list_init(&self->own.node);
        for (size_t i = 0; i < count; i++) {
            self->buffers[i] = buffers[i];
            self->total += buffers[i].size;
        }
        tpr_os_lock_take(&end->lock);
        bool put = tpr_base_map_put(map, transfer->id, self);
        tpr_os_lock_give(&end->lock);
        transfer->channel_data = put ? self : NULL;
        *out = self;
        if (put) return TPRPC_OK;
        tpr_base_pool_free(pool, self, tpr_batch_size(count));
    }
    return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "%s: no memory for a transfer of %zu buffers", name, count);
}

// Ends a batch: out of the map, its memory back, then the word to its owner.
static void tpr_batch_finish(tpr_batch *self, tprpc_status status) {
    tprpc_transfer *transfer = self->transfer;
    tpr_batch_end *end = self->end;
    const char *name = end->queue->method->name;
    tprpc_error error = TPR_ZERO;
    tpr_base_list_remove(&self->own.node);     // where it still waits
    tpr_os_lock_take(&end->lock);
    tpr_base_map_remove(self->sending ? &end->sends : &end->receives, transfer->id);
    tpr_os_lock_give(&end->lock);
    tpr_base_pool_free(&tpr_batch_loop(end)->pool, self, tpr_batch_size(self->count));
    if (status != TPRPC_OK) tprpc_error_set(&error, status, 0, "%s: the transfer was %s", name,
                                            status == TPRPC_ERROR_CANCELLED ? "cancelled"
                                            : status == TPRPC_ERROR_MEMORY  ? "given up, for there was no memory"
                                                                            : "broken off by the peer");
    tprpc_transfer_done(transfer, status, status == TPRPC_OK ? NULL : &error);
}

// ---- sending

// A send is over; it ends when nobody is at its memory.
static void tpr_batch_over(tpr_batch *send, tprpc_status status) {
    const tpr_batch_method *method = send->end->queue->method;
    if (!send->over) send->status = status;
    send->over = true;
    if (!send->lent && method->withdraw) send->lent = !method->withdraw(send);
    if (!send->lent) tpr_batch_finish(send, send->status);
}

// Gives a send up and tells the receiver. To tell may end the pipe, which aborts all, or have the link give back what
// it was lent: either would end this one, so it is over before, or lent meanwhile.
static void tpr_batch_cancel(tpr_batch *send, tprpc_status status) {
    const bool lent = send->lent;
    if (!send->over) send->status = status;
    send->over = send->lent = true;
    tpr_batch_say(send->end, TPR_BATCH_CANCEL, send->transfer->id);
    if (lent) return;
    send->lent = false;
    tpr_batch_over(send, status);
}

// Hands the next buffer to the link; when all were taken it is over.
static void tpr_batch_push(tpr_batch *send) {
    tpr_batch_end *end = send->end;
    while (send->pushed < send->count && !send->buffers[send->pushed].size) send->pushed++;
    if (send->pushed == send->count) {
        tpr_batch_over(send, TPRPC_OK);
        return;
    }
    tprpc_buffer *buffer = &send->buffers[send->pushed++];
    uint64_t offset = send->moved, id = send->transfer->id;
    send->moved += buffer->size;
    tprpc_status status = tprpc_link_bulk(end->link, id, offset, buffer->data, buffer->size, &send->back);
    send->lent = status == TPRPC_OK;
    if (!send->lent) tpr_batch_cancel(send, status == TPRPC_ERROR_MEMORY ? status : TPRPC_ERROR_PEER);
}

static void tpr_batch_back(tprpc_work *work) {
    tpr_batch *send = TPR_CONTAINER(work, tpr_batch, back);
    send->lent = false;
    if (send->over) tpr_batch_over(send, send->status);
    else tpr_batch_push(send);
}

static tprpc_status tpr_batch_send(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                                   uint8_t *descriptor, size_t *descriptor_size, tprpc_error *error) {
    tpr_batch_end *self = (tpr_batch_end *)end;
    tpr_batch *send;
    *descriptor_size = 0;
    tprpc_status status = tpr_batch_begin(self, transfer, buffers, count, true, &send, error);
    if (status != TPRPC_OK) return status;
    send->back.run = tpr_batch_back;
    send->back.loop = self->queue->host->loop;
    if (self->queue->method->offer) *descriptor_size = self->queue->method->offer(send, descriptor);
    return TPRPC_OK;
}

// ---- receiving

static void tpr_batch_fetch(tpr_batch *batch);

static void tpr_batch_queue_in(tpr_batch_queue *queue, tpr_batch_worker *worker) {
    tpr_base_list_add(&queue->workers, &worker->node);
    if (queue->posted) return;
    queue->posted = true;
    tprpc_defer(queue->host->context, &queue->work);
}

// The bytes from `at` on, `size` of them, as pieces of the batch's buffers. Returns how many bytes those have.
static size_t tpr_batch_cut(tpr_batch_worker *worker, uint64_t at, size_t size, tpr_batch_piece *pieces,
                            size_t *count) {
    const tpr_batch *batch = worker->batch;
    size_t cut = 0;
    *count = 0;
    while (cut < size && *count < TPR_BATCH_PIECES) {
        size_t length = batch->buffers[worker->buffer].size, offset = (size_t)(at + cut - worker->before);
        if (offset >= length) {
            worker->before += length;
            worker->buffer++;
            continue;
        }
        tpr_batch_piece *piece = &pieces[(*count)++];
        piece->buffer = worker->buffer;
        piece->offset = offset;
        piece->size = length - offset < size - cut ? length - offset : size - cut;
        cut += piece->size;
    }
    return cut;
}

static size_t tpr_batch_chunk_size(const tpr_batch_queue *queue) {
    const tpr_loop *loop = &queue->host->context->loops[queue->host->loop];
    return tpr_loop_chunk(loop, TPR_BATCH_CHUNK, TPR_LOOP_QUICK_COPY);
}

// Takes a chunk and fetches it, lowering *left. Returns whether there may be more.
static bool tpr_batch_chunk(tpr_batch_worker *worker, size_t *left) {
    tpr_batch *batch = worker->batch;
    tpr_batch_piece pieces[TPR_BATCH_PIECES];
    const size_t most = tpr_batch_chunk_size(worker->queue);
    const uint64_t at = TPR_ATOMIC_ADD(&batch->next, (uint64_t)most);
    if (at >= batch->total) return false;
    const size_t size = batch->total - at < most ? (size_t)(batch->total - at) : most;
    const size_t counted = size > TPR_BATCH_LEAST ? size : (size_t)TPR_BATCH_LEAST;
    for (size_t done = 0, count; done < size && !TPR_ATOMIC_PEEK(&batch->outcome);) {
        done += tpr_batch_cut(worker, at + done, size - done, pieces, &count);
        uint32_t none = TPR_BATCH_FETCHED, outcome = batch->end->queue->method->fetch(batch, pieces, count);
        if (outcome) TPR_ATOMIC_CAS(&batch->outcome, &none, outcome);
    }
    *left -= counted < *left ? counted : *left;
    return at + size < batch->total && !TPR_ATOMIC_PEEK(&batch->outcome);
}

// Tells the sender how a receive goes. That may end the pipe, which aborts all: this one is then kept, with the status.
static tprpc_status tpr_batch_tell(tpr_batch *receive, uint8_t word) {
    const tprpc_status status = receive->status;
    receive->workers = 1;
    if (!receive->lost) tpr_batch_say(receive->end, word, receive->transfer->id);
    receive->workers = 0;
    return word == TPR_BATCH_READY ? receive->status : status;
}

// All that were at it have come back.
static void tpr_batch_fetched(tpr_batch *batch) {
    const tpr_batch_method *method = batch->end->queue->method;
    uint32_t outcome = TPR_ATOMIC_LOAD(&batch->outcome);
    if (!outcome && method->confirm) outcome = method->confirm(batch);
    const bool pushed = batch->status == TPRPC_OK && outcome == TPR_BATCH_UNREADABLE;
    if (batch->status == TPRPC_OK && outcome && !pushed) batch->status = TPRPC_ERROR_PEER;
    batch->end->link->fallbacks += pushed;
    const uint8_t word = pushed ? TPR_BATCH_READY : batch->status == TPRPC_OK ? TPR_BATCH_DONE : TPR_BATCH_DROP;
    const tprpc_status status = tpr_batch_tell(batch, word);
    if (!pushed || status != TPRPC_OK) tpr_batch_finish(batch, status);
    else batch->asked = true;
}

// A worker has no more to do, and is on the batch's own loop. Helpers that are not at work need not be waited for.
static void tpr_batch_worker_back(tpr_batch *batch) {
    for (size_t i = 0; i < TPR_BATCH_HELPERS; i++) {
        uint32_t called = TPR_BATCH_CALLED;
        if (!batch->helpers[i] || !TPR_ATOMIC_CAS(&batch->helpers[i]->state, &called, (uint32_t)TPR_BATCH_REVOKED))
            continue;
        batch->helpers[i] = NULL;
        batch->workers--;
    }
    if (--batch->workers == 0) tpr_batch_fetched(batch);
}

// This loop's worker finds no more chunks: the next batch's turn.
static void tpr_batch_own_back(tpr_batch *batch) {
    tpr_batch_end *end = batch->end;
    if (end->first == batch) {
        end->first = NULL;
        if (!tpr_base_list_empty(&end->waiting)) {
            tpr_batch *next = TPR_CONTAINER(end->waiting.next, tpr_batch, own.node);
            tpr_base_list_remove(&next->own.node);
            tpr_batch_fetch(next);
        }
    }
    tpr_batch_worker_back(batch);
}

static void tpr_batch_helper_home(tprpc_work *work) {
    tpr_batch_worker *helper = TPR_CONTAINER(work, tpr_batch_worker, work);
    tpr_batch *batch = helper->batch;
    for (size_t i = 0; i < TPR_BATCH_HELPERS; i++) if (batch->helpers[i] == helper) batch->helpers[i] = NULL;
    tpr_base_pool_free(&tpr_batch_loop(batch->end)->pool, helper, sizeof *helper);
    tpr_batch_worker_back(batch);
}

static void tpr_batch_helper_free(tpr_batch_worker *helper) {
    const tprpc_host *host = helper->queue->host;
    tpr_base_pool_free(&host->context->loops[host->loop].pool, helper, sizeof *helper);
}

static void tpr_batch_helper_step(tpr_batch_worker *helper, size_t *left) {
    uint32_t called = TPR_BATCH_CALLED;
    if (!TPR_ATOMIC_CAS(&helper->state, &called, (uint32_t)TPR_BATCH_AT_WORK)) {
        tpr_batch_helper_free(helper);
        return;
    }
    if (tpr_batch_chunk(helper, left)) {
        TPR_ATOMIC_STORE(&helper->state, (uint32_t)TPR_BATCH_CALLED);
        tpr_batch_queue_in(helper->queue, helper);
        return;
    }
    helper->work.run = tpr_batch_helper_home;
    helper->work.loop = helper->batch->end->queue->host->loop;
    tprpc_defer(helper->queue->host->context, &helper->work);
}

static void tpr_batch_helper_come(tprpc_work *work) {
    tpr_batch_worker *helper = TPR_CONTAINER(work, tpr_batch_worker, work);
    tpr_batch_queue_in(helper->queue, helper);
}

// A chunk for all that are here, so that a poll with a budget can stop behind it.
static void tpr_batch_run(tprpc_work *work) {
    tpr_batch_queue *queue = TPR_CONTAINER(work, tpr_batch_queue, work);
    size_t left = tpr_batch_chunk_size(queue);
    while (left > 0 && !tpr_base_list_empty(&queue->workers)) {
        tpr_batch_worker *first = TPR_CONTAINER(queue->workers.next, tpr_batch_worker, node);
        tpr_base_list_remove(&first->node);
        if (first->work.run) tpr_batch_helper_step(first, &left);
        else if (tpr_batch_chunk(first, &left)) tpr_batch_queue_in(queue, first);
        else tpr_batch_own_back(first->batch);
    }
    queue->posted = !tpr_base_list_empty(&queue->workers);
    if (queue->posted) tprpc_defer(queue->host->context, work);
}

// Puts workers to it: this loop's, and for a large one helpers on the next loops.
static void tpr_batch_fetch(tpr_batch *batch) {
    tpr_batch_queue *queue = batch->end->queue;
    tprpc_context *ctx = queue->host->context;
    uint32_t loops = batch->total < TPR_BATCH_SPREAD ? 1 : ctx->loop_count;
    batch->workers = 1;
    if (batch->total > TPR_BATCH_CHUNK) batch->end->first = batch;
    for (uint32_t i = 1; i < loops && i <= TPR_BATCH_HELPERS; i++) {
        tpr_batch_worker *helper = (tpr_batch_worker *)tpr_base_pool_alloc(&tpr_batch_loop(batch->end)->pool,
                                                                           sizeof *helper);
        if (!helper) break;            // it goes without
        memset(helper, 0, sizeof *helper);
        helper->batch = batch;
        helper->work.run = tpr_batch_helper_come;
        helper->work.loop = (queue->host->loop + i) % ctx->loop_count;
        helper->queue = (tpr_batch_queue *)tpr_context_instance(queue->host, helper->work.loop);
        batch->helpers[i - 1] = helper;
        batch->workers++;
        tprpc_defer(ctx, &helper->work);
    }
    batch->own.batch = batch;
    batch->own.queue = queue;
    tpr_batch_queue_in(queue, &batch->own);
}

static tprpc_status tpr_batch_recv(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                                   const uint8_t *descriptor, size_t descriptor_size, tprpc_error *error) {
    tpr_batch_end *self = (tpr_batch_end *)end;
    const tpr_batch_method *method = self->queue->method;
    const uint64_t id = transfer->id;
    tpr_batch *receive;
    tprpc_status status = tpr_batch_begin(self, transfer, buffers, count, false, &receive, error);
    if (status != TPRPC_OK) {          // the sender, which waits, is told
        tpr_batch_say(self, TPR_BATCH_DROP, id);
        return status;
    }
    if (method->fetch && (!method->find || method->find(receive, descriptor, descriptor_size))) {
        if (self->first && receive->total > TPR_BATCH_CHUNK) tpr_base_list_add(&self->waiting, &receive->own.node);
        else tpr_batch_fetch(receive);
        return TPRPC_OK;
    }
    const bool empty = receive->total == 0;
    self->link->fallbacks += method->fetch != NULL;
    receive->asked = true;
    tpr_batch_say(self, TPR_BATCH_READY, id);   // which may end the pipe, and the receive
    if (empty && (receive = (tpr_batch *)tpr_base_map_get(&self->receives, id)) != NULL)
        tpr_batch_finish(receive, TPRPC_OK);
    return TPRPC_OK;
}

TPR_COLD static void tpr_batch_abort(void *end, tprpc_transfer *transfer, bool link_lost) {
    tpr_batch *self = (tpr_batch *)transfer->channel_data;
    tprpc_status status = link_lost ? TPRPC_ERROR_PEER : TPRPC_ERROR_CANCELLED;
    (void)end;
    if (!self) return;                       // its beginning has failed, and to say so ended the pipe
    if (self->sending && link_lost) {
        tpr_batch_over(self, status);
    } else if (self->sending) {
        tpr_batch_cancel(self, status);
    } else {
        self->status = status;
        self->lost = link_lost;
        TPR_ATOMIC_STORE(&self->outcome, (uint32_t)TPR_BATCH_STOPPED);
        if (!self->workers) tpr_batch_finish(self, tpr_batch_tell(self, TPR_BATCH_DROP));   // else the last ends it
    }
}

// ---- from the twin

static tprpc_status tpr_batch_control(void *end, const uint8_t *bytes, size_t size, const intptr_t *handles,
                                      size_t count) {
    tpr_batch_end *self = (tpr_batch_end *)end;
    (void)handles;
    if (size != 16 || count) return TPRPC_ERROR_PROTOCOL;
    uint64_t id = tpr_base_load_le64(bytes + 8);
    tpr_batch *batch = (tpr_batch *)tpr_base_map_get(bytes[0] == TPR_BATCH_CANCEL ? &self->receives : &self->sends, id);
    switch (bytes[0]) {
    case TPR_BATCH_READY:
        if (!batch) tpr_batch_say(self, TPR_BATCH_CANCEL, id);
        if (!batch || batch->pushed || batch->over) return TPRPC_OK;
        self->link->fallbacks += self->queue->method->fetch != NULL;
        tpr_batch_push(batch);
        return TPRPC_OK;
    case TPR_BATCH_DROP:      // what the link has taken goes out, the rest does not
        if (batch) tpr_batch_over(batch, TPRPC_ERROR_PEER);
        return TPRPC_OK;
    case TPR_BATCH_DONE:
        if (batch) tpr_batch_over(batch, TPRPC_OK);
        return TPRPC_OK;
    case TPR_BATCH_CANCEL:
        if (batch && batch->workers) TPR_ATOMIC_STORE(&batch->outcome, (uint32_t)TPR_BATCH_GONE);
        else if (batch) tpr_batch_finish(batch, TPRPC_ERROR_PEER);
        return TPRPC_OK;
    default:
        return TPRPC_ERROR_PROTOCOL;
    }
}

// Where bytes go: the offset counts over all buffers of the transfer, and a piece lies within one of them. Pieces come
// in any order, over several connections.
static void *tpr_batch_bulk(void *end, uint64_t id, uint64_t offset, size_t size) {
    tpr_batch *self = (tpr_batch *)tpr_base_map_get(&((tpr_batch_end *)end)->receives, id);
    if (!self || !self->asked) return NULL;
    for (size_t i = 0; i < self->count; i++) {
        uint64_t length = self->buffers[i].size;
        if (offset < length) return size <= length - offset ? (uint8_t *)self->buffers[i].data + offset : NULL;
        offset -= length;
    }
    return NULL;
}

static void tpr_batch_bulk_done(void *end, uint64_t id, uint64_t offset, size_t size) {
    tpr_batch *self = (tpr_batch *)tpr_base_map_get(&((tpr_batch_end *)end)->receives, id);
    (void)offset;
    if (!self || !self->asked) return;
    self->moved += size;
    if (self->moved >= self->total) tpr_batch_finish(self, TPRPC_OK);
}

// ---- instances and ends

static tprpc_status tpr_batch_open(const tprpc_host *host, const tpr_batch_method *method, void **instance,
                                   tprpc_error *error) {
    tpr_batch_queue *self = (tpr_batch_queue *)tpr_context_alloc(host->context, sizeof *self);
    if (!self) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "%s: no memory for an instance", method->name);
    self->method = method;
    self->host = host;
    self->work.run = tpr_batch_run;
    self->work.loop = host->loop;
    tpr_base_list_init(&self->workers);
    *instance = self;
    return TPRPC_OK;
}

static void tpr_batch_close(void *instance) {
    tpr_batch_queue *self = (tpr_batch_queue *)instance;
    while (!tpr_base_list_empty(&self->workers)) {   // helpers that were revoked
        tpr_batch_worker *helper = TPR_CONTAINER(self->workers.next, tpr_batch_worker, node);
        tpr_base_list_remove(&helper->node);
        tpr_batch_helper_free(helper);
    }
    tpr_context_free(self->host->context, self, sizeof *self);
}

static bool tpr_batch_moves(void *instance, tprpc_device from, tprpc_device to) {
    (void)instance;
    return from.kind == TPRPC_CPU && to.kind == TPRPC_CPU;
}

// A new end of `size` bytes, which begin with a tpr_batch_end.
static void *tpr_batch_attach(void *instance, tprpc_link *link, size_t size, tprpc_error *error) {
    tpr_batch_queue *queue = (tpr_batch_queue *)instance;
    tprpc_context *ctx = queue->host->context;
    tpr_batch_end *self = (tpr_batch_end *)tpr_context_alloc(ctx, size);
    if (!self) {
        tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a channel %s", queue->method->name);
        return NULL;
    }
    self->queue = queue;
    self->link = link;
    self->sends.memory = self->receives.memory = &ctx->env.memory;
    tpr_base_list_init(&self->waiting);
    return self;
}

static void tpr_batch_detach(tpr_batch_end *self, size_t size) {
    tpr_base_map_clear(&self->sends);
    tpr_base_map_clear(&self->receives);
    tpr_context_free(self->queue->host->context, self, size);
}

// >>basic -------------------------------------------------------------------------------------------------------------
// The channel that always works: host memory through the pipe's own connection, in chunks. The receiver says when it
// is ready, then the sender's bytes go straight into its buffers.
//
// Uses: os, base, loop, context, channel, batch.
// Invariant: it has no state but that of its batches.

static const tpr_batch_method tpr_basic_method = {"basic", NULL, NULL, NULL, NULL, NULL};

static tprpc_status tpr_basic_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    (void)user;
    return tpr_batch_open(host, &tpr_basic_method, instance, error);
}

static size_t tpr_basic_domain(void *instance, uint8_t *out, size_t capacity) {
    (void)instance; (void)out; (void)capacity;
    return 0;
}

static bool tpr_basic_reaches(void *instance, const uint8_t *domain, size_t size) {
    (void)instance; (void)domain; (void)size;
    return true;
}

static tprpc_status tpr_basic_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    *end = tpr_batch_attach(instance, link, sizeof(tpr_batch_end), error);
    return *end ? TPRPC_OK : TPRPC_ERROR_MEMORY;
}

static void tpr_basic_detach(void *end) { tpr_batch_detach((tpr_batch_end *)end, sizeof(tpr_batch_end)); }

static const tprpc_channel_table tpr_basic_table = {
    (uint32_t)sizeof(tprpc_channel_table), 0, 0, 1, 0, 0,
    tpr_basic_open, tpr_batch_close, tpr_basic_domain, tpr_basic_reaches, NULL, NULL, NULL, tpr_batch_moves,
    tpr_basic_attach, tpr_basic_detach, NULL, NULL, NULL, tpr_batch_send, tpr_batch_recv, tpr_batch_abort,
    tpr_batch_control, tpr_batch_bulk, tpr_batch_bulk_done, NULL, NULL, NULL, NULL, 1,
};

static const tprpc_backend tpr_basic_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "basic", "Host memory in chunks through the pipe's own connection.",
    1000, NULL, &tpr_basic_table, NULL, NULL,
};

// >>xth ---------------------------------------------------------------------------------------------------------------
// Host memory between threads of one process: the receiver copies straight from the sender's buffers, or keeps those
// that were given to it.
//
// Uses: os, base, loop, context, channel, batch.
// Invariant: no pointer of a peer's is ever believed: a receiver finds the sender's end by its key in the registry of
// this process, and the buffers by the transfer's id in that end, under the end's lock. While it copies a chunk, and as
// long as it keeps what was given, it is counted in the batch, which does not end before.

#ifndef TPRPC_NO_XTH
enum {
    TPR_XTH_KEY = 16,
    TPR_XTH_LARGE = 16 << 20,         // bytes of a transfer from which its copy bypasses the cache
    TPR_XTH_ALIGNMENT = 64            // that incoming bytes have
};

typedef struct tpr_xth_end {
    tpr_batch_end  batch;             // first
    tpr_base_list  node;              // in the registry
    uint32_t       users;             // receivers that hold it, under the registry's lock
    uint8_t        key[TPR_XTH_KEY], secret[TPR_XTH_KEY], peer_key[TPR_XTH_KEY];
} tpr_xth_end;

// The one thing of the process's that the library keeps: which ends live in it. Empty unless two contexts of the
// process are connected; each vendored copy has its own, and such copies see each other as two processes.
static struct { tpr_os_lock lock; tpr_base_list *first; } tpr_xth_registry;

static void tpr_xth_register(tpr_xth_end *end) {
    tpr_os_lock_take(&tpr_xth_registry.lock);
    end->node.next = tpr_xth_registry.first;
    end->node.prev = NULL;
    if (end->node.next) end->node.next->prev = &end->node;
    tpr_xth_registry.first = &end->node;
    tpr_os_lock_give(&tpr_xth_registry.lock);
}

// Takes an end out once no receiver holds it; one that does has no batch of it any more and lets go at once.
static void tpr_xth_unregister(tpr_xth_end *end) {
    for (;;) {
        tpr_os_lock_take(&tpr_xth_registry.lock);
        bool held = end->users > 0;
        if (!held) {
            if (end->node.prev) end->node.prev->next = end->node.next;
            else tpr_xth_registry.first = end->node.next;
            if (end->node.next) end->node.next->prev = end->node.prev;
        }
        tpr_os_lock_give(&tpr_xth_registry.lock);
        if (!held) return;
        tpr_os_lock_take(&end->batch.lock);
        tpr_os_lock_give(&end->batch.lock);
    }
}

// The live end of that key, held and locked, or NULL.
static tpr_xth_end *tpr_xth_find(const uint8_t *key) {
    tpr_xth_end *found = NULL;
    tpr_os_lock_take(&tpr_xth_registry.lock);
    for (tpr_base_list *i = tpr_xth_registry.first; i && !found; i = i->next) {
        tpr_xth_end *end = TPR_CONTAINER(i, tpr_xth_end, node);
        if (memcmp(end->key, key, TPR_XTH_KEY) == 0) found = end;
    }
    if (found) found->users++;
    tpr_os_lock_give(&tpr_xth_registry.lock);
    if (found) tpr_os_lock_take(&found->batch.lock);
    return found;
}

static void tpr_xth_let_go(tpr_xth_end *end) {
    tpr_os_lock_take(&tpr_xth_registry.lock);
    tpr_os_lock_give(&end->batch.lock);
    end->users--;
    tpr_os_lock_give(&tpr_xth_registry.lock);
}

static bool tpr_xth_same_sizes(const tpr_batch *send, const tprpc_buffer *buffers, size_t count) {
    bool same = send->count == count;
    for (size_t i = 0; same && i < count; i++) same = send->buffers[i].size == buffers[i].size;
    return same;
}

// A reader has left; under the end's lock.
static void tpr_xth_leave(tpr_batch *send) {
    if (--send->readers == 0 && send->withdrawn) tprpc_defer(send->end->queue->host->context, &send->back);
}

// The hold is the sender's batch, which does not end while it has a reader; and so its end is held as well.
static void *tpr_xth_adopt(void *end, uint64_t transfer, tprpc_buffer *buffers, size_t count) {
    tpr_xth_end *peer = tpr_xth_find(((tpr_xth_end *)end)->peer_key);
    if (!peer) return NULL;
    tpr_batch *send = (tpr_batch *)tpr_base_map_get(&peer->batch.sends, transfer);
    const bool given = send && !send->withdrawn && (send->transfer->flags & TPRPC_TRANSFER_GIVEN) &&
                       tpr_xth_same_sizes(send, buffers, count);
    bool any = false;
    for (size_t i = 0; given && i < count; i++) {
        void *data = send->buffers[i].data;
        if (buffers[i].data || !buffers[i].size || (uintptr_t)data % TPR_XTH_ALIGNMENT) continue;
        buffers[i].data = data;
        any = true;
    }
    if (any) {
        send->readers++;
        tpr_os_lock_give(&peer->batch.lock);
    } else {
        tpr_xth_let_go(peer);
    }
    return any ? send : NULL;
}

static void tpr_xth_yield(void *instance, void *hold) {
    tpr_batch *send = (tpr_batch *)hold;
    tpr_xth_end *peer = (tpr_xth_end *)send->end;
    (void)instance;
    tpr_os_lock_take(&peer->batch.lock);
    tpr_xth_leave(send);
    tpr_xth_let_go(peer);
}

// What was adopted is there already, and counts as nothing.
static bool tpr_xth_meet(tpr_batch *receive, const uint8_t *descriptor, size_t size) {
    tpr_xth_end *peer = tpr_xth_find(((tpr_xth_end *)receive->end)->peer_key);
    (void)descriptor;
    (void)size;
    if (!peer) return false;
    tpr_batch *send = (tpr_batch *)tpr_base_map_get(&peer->batch.sends, receive->transfer->id);
    const bool same = send && tpr_xth_same_sizes(send, receive->buffers, receive->count);
    for (size_t i = 0; same && i < receive->count; i++) {
        if (receive->buffers[i].data != send->buffers[i].data) continue;
        receive->total -= receive->buffers[i].size;
        receive->buffers[i].size = 0;
    }
    tpr_xth_let_go(peer);
    return same;
}

static tpr_batch_outcome tpr_xth_fetch(tpr_batch *receive, const tpr_batch_piece *pieces, size_t count) {
    tpr_xth_end *peer = tpr_xth_find(((tpr_xth_end *)receive->end)->peer_key);
    if (!peer) return TPR_BATCH_GONE;
    tpr_batch *send = (tpr_batch *)tpr_base_map_get(&peer->batch.sends, receive->transfer->id);
    const bool found = send && !send->withdrawn;
    if (found) {
        send->readers++;
        tpr_os_lock_give(&peer->batch.lock);
        for (size_t i = 0; i < count; i++) {
            const tpr_batch_piece *p = &pieces[i];
            uint8_t *to = (uint8_t *)receive->buffers[p->buffer].data + p->offset;
            const uint8_t *from = (const uint8_t *)send->buffers[p->buffer].data + p->offset;
            if (receive->total >= TPR_XTH_LARGE) tpr_os_copy_large(to, from, p->size);
            else memcpy(to, from, p->size);
        }
        tpr_os_lock_take(&peer->batch.lock);
        tpr_xth_leave(send);
    }
    tpr_xth_let_go(peer);
    return found ? TPR_BATCH_FETCHED : TPR_BATCH_GONE;
}

static bool tpr_xth_withdraw(tpr_batch *send) {
    tpr_os_lock_take(&send->end->lock);
    send->withdrawn = true;
    const bool idle = send->readers == 0;
    tpr_os_lock_give(&send->end->lock);
    return idle;
}

static const tpr_batch_method tpr_xth_method = {"xth", tpr_xth_fetch, tpr_xth_meet, NULL, NULL, tpr_xth_withdraw};

static tprpc_status tpr_xth_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    (void)user;
    return tpr_batch_open(host, &tpr_xth_method, instance, error);
}

TPR_COLD static size_t tpr_xth_domain(void *instance, uint8_t *out, size_t capacity) {
    char boot[40];
    (void)instance;
    tpr_os_boot_id(boot, sizeof boot);
    return (size_t)snprintf((char *)out, capacity, "%.36s %d", boot, (int)tpr_os_pid());
}

TPR_COLD static bool tpr_xth_reaches(void *instance, const uint8_t *domain, size_t size) {
    uint8_t own[64];
    size_t own_size = tpr_xth_domain(instance, own, sizeof own);
    return own_size == size && memcmp(own, domain, size) == 0;
}

static tprpc_status tpr_xth_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    tpr_xth_end *self = (tpr_xth_end *)tpr_batch_attach(instance, link, sizeof *self, error);
    if (!self) return TPRPC_ERROR_MEMORY;
    if (tpr_os_random(self->key, TPR_XTH_KEY) != 0 || tpr_os_random(self->secret, TPR_XTH_KEY) != 0) {
        const int code = errno;
        tpr_batch_detach(&self->batch, sizeof *self);
        return tpr_base_os_error(error, code, "reading", "random bytes");
    }
    tpr_xth_register(self);
    *end = self;
    return TPRPC_OK;
}

TPR_COLD static void tpr_xth_detach(void *end) {
    tpr_xth_end *self = (tpr_xth_end *)end;
    tpr_xth_unregister(self);
    tpr_batch_detach(&self->batch, sizeof *self);
}

static size_t tpr_xth_challenge(void *end, uint8_t *out, size_t capacity) {
    (void)capacity;
    memcpy(out, ((tpr_xth_end *)end)->key, TPR_XTH_KEY);
    return TPR_XTH_KEY;
}

// Only who is in this process can look the secret up.
TPR_COLD static size_t tpr_xth_answer(void *end, const uint8_t *challenge, size_t size, uint8_t *out, size_t capacity) {
    tpr_xth_end *self = (tpr_xth_end *)end, *peer;
    (void)capacity;
    if (size != TPR_XTH_KEY || (peer = tpr_xth_find(challenge)) == NULL) return 0;
    memcpy(self->peer_key, challenge, TPR_XTH_KEY);
    memcpy(out, peer->secret, TPR_XTH_KEY);
    tpr_xth_let_go(peer);
    return TPR_XTH_KEY;
}

TPR_COLD static tprpc_status tpr_xth_verify(void *end, const uint8_t *answer, size_t size, tprpc_error *error) {
    tpr_xth_end *self = (tpr_xth_end *)end;
    if (size == TPR_XTH_KEY && memcmp(answer, self->secret, TPR_XTH_KEY) == 0) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                           "the peer is not in this process, or has its own copy of tprpc");
}

static const tprpc_channel_table tpr_xth_table = {
    (uint32_t)sizeof(tprpc_channel_table), (uint32_t)TPRPC_CHANNEL_MUTUAL, 0, 1, 0, 0,
    tpr_xth_open, tpr_batch_close, tpr_xth_domain, tpr_xth_reaches, NULL, NULL, NULL, tpr_batch_moves,
    tpr_xth_attach, tpr_xth_detach, tpr_xth_challenge, tpr_xth_answer, tpr_xth_verify, tpr_batch_send, tpr_batch_recv,
    tpr_batch_abort, tpr_batch_control, tpr_batch_bulk, tpr_batch_bulk_done, NULL, NULL, tpr_xth_adopt, tpr_xth_yield,
    0,
};

static const tprpc_backend tpr_xth_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "xth",
    "Host memory between threads of one process, copied once, or not at all where it is given.",
    1300, NULL, &tpr_xth_table, NULL, NULL,
};
#endif // TPRPC_NO_XTH

// >>cma ---------------------------------------------------------------------------------------------------------------
// Host memory of another process of this host, which the receiver reads from there: copied once, by one side
// (process_vm_readv, "cross-memory attach").
//
// Uses: atomic, os, base, process, loop, context, channel, batch.
// Invariant: what was read counts only if the sender's word for the transfer was still there after it, and the process
// that the connection's credentials name was alive after all of it: its number may become another's.

#ifndef TPRPC_NO_CMA
enum { TPR_CMA_NONCE = 16, TPR_CMA_WORD = 16 };   // bytes of a proof, and of a descriptor: u64 where the table is, u64
                                                  // word, as both ends' memory has them
typedef struct tpr_cma_end {
    tpr_batch_end     batch;          // first
    tpr_process_watch process;        // the twin's, where it is not this one
    int32_t           pid;
    bool              dead;
    uint64_t          words;          // a transfer's word is this plus its id
    uint8_t           nonce[TPR_CMA_NONCE];
} tpr_cma_end;

static bool tpr_cma_alive(const tpr_cma_end *end) {
    return !end->dead && (end->pid == tpr_os_pid() || tpr_process_lives(&end->process));
}

static void tpr_cma_ended(tpr_process_watch *watch) { TPR_CONTAINER(watch, tpr_cma_end, process)->dead = true; }

// Whether all of it was read.
static bool tpr_cma_read(const tpr_cma_end *end, void *to, uint64_t from, size_t size) {
    tprpc_span here, there;
    here.data = to;
    there.data = (void *)(uintptr_t)from;
    here.size = there.size = size;
    return tpr_os_read_process(end->pid, &here, &there, 1) == (int64_t)size;
}

// A send's table: [0] the word, 0 once it is over, [1] and up where its buffers are. The receiver's is: [0] where that
// is, [1] the word, [2] and up where the buffers are.
static size_t tpr_cma_offer(tpr_batch *send, uint8_t *descriptor) {
    const uint64_t word = ((tpr_cma_end *)send->end)->words + send->transfer->id;
    for (size_t i = 0; i < send->count; i++) send->table[i + 1] = (uintptr_t)send->buffers[i].data;
    TPR_ATOMIC_STORE(&send->table[0], word);
    tpr_base_store_le64(descriptor, (uintptr_t)send->table);
    tpr_base_store_le64(descriptor + 8, word);
    return TPR_CMA_WORD;
}

static bool tpr_cma_withdraw(tpr_batch *send) {
    TPR_ATOMIC_STORE_FULL(&send->table[0], (uint64_t)0);
    return true;
}

static bool tpr_cma_find(tpr_batch *receive, const uint8_t *descriptor, size_t size) {
    const tpr_cma_end *end = (const tpr_cma_end *)receive->end;
    if (size != TPR_CMA_WORD) return false;
    receive->table[0] = tpr_base_load_le64(descriptor);
    return tpr_cma_read(end, &receive->table[1], receive->table[0], (receive->count + 1) * sizeof(uint64_t)) &&
           receive->table[1] == tpr_base_load_le64(descriptor + 8);
}

// The word is read last, by the same call.
static tpr_batch_outcome tpr_cma_fetch(tpr_batch *receive, const tpr_batch_piece *pieces, size_t count) {
    tprpc_span to[TPR_BATCH_PIECES + 1], from[TPR_BATCH_PIECES + 1];
    uint64_t word = 0;
    int64_t size = (int64_t)sizeof word;
    for (size_t i = 0; i < count; i++) {
        const tpr_batch_piece *p = &pieces[i];
        to[i].data = (uint8_t *)receive->buffers[p->buffer].data + p->offset;
        from[i].data = (void *)(uintptr_t)(receive->table[p->buffer + 2] + p->offset);
        to[i].size = from[i].size = p->size;
        size += (int64_t)p->size;
    }
    to[count].data = &word;
    from[count].data = (void *)(uintptr_t)receive->table[0];
    to[count].size = from[count].size = sizeof word;
    if (tpr_os_read_process(((const tpr_cma_end *)receive->end)->pid, to, from, count + 1) != size)
        return TPR_BATCH_UNREADABLE;
    return word == receive->table[1] ? TPR_BATCH_FETCHED : TPR_BATCH_GONE;
}

static tpr_batch_outcome tpr_cma_confirm(tpr_batch *receive) {
    return tpr_cma_alive((const tpr_cma_end *)receive->end) ? TPR_BATCH_FETCHED : TPR_BATCH_GONE;
}

static const tpr_batch_method tpr_cma_method = {"cma",           tpr_cma_fetch, tpr_cma_find,
                                                tpr_cma_confirm, tpr_cma_offer, tpr_cma_withdraw};

TPR_COLD static tprpc_status tpr_cma_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    uint64_t here = 1, copy = 0;
    tprpc_span to, from;
    (void)user;
    if (!host->context->process_space)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                               "cma: this system does not say what its process numbers are counted in");
    to.data = &copy;
    from.data = &here;
    to.size = from.size = sizeof here;
    if (tpr_os_read_process(tpr_os_pid(), &to, &from, 1) != (int64_t)sizeof here)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, errno, "cma: process_vm_readv: %s", strerror(errno));
    return tpr_batch_open(host, &tpr_cma_method, instance, error);
}

static size_t tpr_cma_domain(void *instance, uint8_t *out, size_t capacity) {
    (void)capacity;
    tpr_base_store_le64(out, ((tpr_batch_queue *)instance)->host->context->process_space);
    return 8;
}

static bool tpr_cma_reaches(void *instance, const uint8_t *domain, size_t size) {
    return size == 8 && tpr_base_load_le64(domain) == ((tpr_batch_queue *)instance)->host->context->process_space;
}

TPR_COLD static tprpc_status tpr_cma_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    const int32_t pid = tprpc_link_process(link);
    if (pid <= 0)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "cma: the transport cannot say whose process it is");
    tpr_cma_end *self = (tpr_cma_end *)tpr_batch_attach(instance, link, sizeof *self, error);
    if (!self) return TPRPC_ERROR_MEMORY;
    self->pid = pid;
    self->process.ended = tpr_cma_ended;
    bool random = tpr_os_random(self->nonce, sizeof self->nonce) == 0 &&
                  tpr_os_random(&self->words, sizeof self->words) == 0;
    const int code = errno;
    if (random && tpr_process_start(&tpr_batch_loop(&self->batch)->processes, pid, &self->process) &&
        tpr_cma_alive(self)) {
        *end = self;
        return TPRPC_OK;
    }
    tpr_process_unwatch(&self->process);
    tpr_batch_detach(&self->batch, sizeof *self);
    return random ? tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "cma: process %d cannot be watched", (int)pid)
                  : tpr_base_os_error(error, code, "reading", "random bytes");
}

TPR_COLD static void tpr_cma_detach(void *end) {
    tpr_cma_end *self = (tpr_cma_end *)end;
    tpr_process_unwatch(&self->process);
    tpr_batch_detach(&self->batch, sizeof *self);
}

static size_t tpr_cma_challenge(void *end, uint8_t *out, size_t capacity) {
    (void)capacity;
    tpr_base_store_le64(out, (uintptr_t)((tpr_cma_end *)end)->nonce);
    return 8;
}

// The nonce, or why it cannot be read.
TPR_COLD static size_t tpr_cma_answer(void *end, const uint8_t *challenge, size_t size, uint8_t *out, size_t capacity) {
    (void)capacity;
    errno = EINVAL;
    if (size == 8 && tpr_cma_read((tpr_cma_end *)end, out, tpr_base_load_le64(challenge), TPR_CMA_NONCE))
        return TPR_CMA_NONCE;
    tpr_base_store_le32(out, (uint32_t)errno);
    return 4;
}

TPR_COLD static tprpc_status tpr_cma_verify(void *end, const uint8_t *answer, size_t size, tprpc_error *error) {
    const int code = size == 4 ? (int)tpr_base_load_le32(answer) : 0;
    if (size == TPR_CMA_NONCE && memcmp(answer, ((tpr_cma_end *)end)->nonce, TPR_CMA_NONCE) == 0) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, code, "the peer cannot read this process's memory: %s",
                           code ? strerror(code) : "it read something else");
}

static const tprpc_channel_table tpr_cma_table = {
    (uint32_t)sizeof(tprpc_channel_table), (uint32_t)TPRPC_CHANNEL_RATED, 0, 1, 0, TPR_CMA_WORD,
    tpr_cma_open, tpr_batch_close, tpr_cma_domain, tpr_cma_reaches, NULL, NULL, NULL, tpr_batch_moves,
    tpr_cma_attach, tpr_cma_detach, tpr_cma_challenge, tpr_cma_answer, tpr_cma_verify, tpr_batch_send, tpr_batch_recv,
    tpr_batch_abort, tpr_batch_control, tpr_batch_bulk, tpr_batch_bulk_done, NULL, NULL, NULL, NULL, 0,
};

static const tprpc_backend tpr_cma_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "cma",
    "Host memory of another process of this host, read from there by process_vm_readv.",
    1190, NULL, &tpr_cma_table, NULL, NULL,
};
#endif // TPRPC_NO_CMA

// >>bulk --------------------------------------------------------------------------------------------------------------
// Host memory of another process of this host, through memory that both share: a lane's ring (>>pipe, lanes), into
// which the sender copies while the receiver copies out of it.
//
// Uses: base, loop, context, channel, batch, basic.
// Invariant: it has no state but that of its batches.

#ifndef TPRPC_NO_BULK
static const tpr_batch_method tpr_bulk_method = {"bulk", NULL, NULL, NULL, NULL, NULL};

static tprpc_status tpr_bulk_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    (void)user;
    return tpr_batch_open(host, &tpr_bulk_method, instance, error);
}

static tprpc_status tpr_bulk_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    if (!(tprpc_link_transport(link) & TPRPC_TRANSPORT_LOCAL_COPY))
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "the transport shares no memory");
    return tpr_basic_attach(instance, link, end, error);
}

static const tprpc_channel_table tpr_bulk_table = {
    (uint32_t)sizeof(tprpc_channel_table), (uint32_t)TPRPC_CHANNEL_RATED, 0, 1, 0, 0,
    tpr_bulk_open, tpr_batch_close, tpr_basic_domain, tpr_basic_reaches, NULL, NULL, NULL, tpr_batch_moves,
    tpr_bulk_attach, tpr_basic_detach, NULL, NULL, NULL, tpr_batch_send, tpr_batch_recv, tpr_batch_abort,
    tpr_batch_control, tpr_batch_bulk, tpr_batch_bulk_done, NULL, NULL, NULL, NULL, 1,
};

static const tprpc_backend tpr_bulk_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "bulk",
    "Host memory of another process of this host, copied in and out of shared memory at a time.",
    1200, NULL, &tpr_bulk_table, NULL, NULL,
};
#endif // TPRPC_NO_BULK

// >>mpt ---------------------------------------------------------------------------------------------------------------
// Host memory over several connections of a network at a time ("multi-path"), in chunks, each over the lane that has
// room. For networks on which one connection does not get all there is.
//
// Uses: base, loop, context, channel, batch, basic.
// Invariant: it has no state but that of its batches.

#ifndef TPRPC_NO_MPT
static const tpr_batch_method tpr_mpt_method = {"mpt", NULL, NULL, NULL, NULL, NULL};

static tprpc_status tpr_mpt_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    (void)user;
    if (host->context->lanes < 2)
        return tprpc_error_set(error, TPRPC_ERROR_CANCELLED, 0, "tprpc_context_desc.lanes is not above 1");
    return tpr_batch_open(host, &tpr_mpt_method, instance, error);
}

static tprpc_status tpr_mpt_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    const uint32_t flags = tprpc_link_transport(link);
    if (!(flags & TPRPC_TRANSPORT_LANES) || (flags & TPRPC_TRANSPORT_LOCAL_COPY))
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                               "the transport is not one that several connections make faster");
    return tpr_basic_attach(instance, link, end, error);
}

static const tprpc_channel_table tpr_mpt_table = {
    (uint32_t)sizeof(tprpc_channel_table), 0, 0, 1, 0, 0,
    tpr_mpt_open, tpr_batch_close, tpr_basic_domain, tpr_basic_reaches, NULL, NULL, NULL, tpr_batch_moves,
    tpr_mpt_attach, tpr_basic_detach, NULL, NULL, NULL, tpr_batch_send, tpr_batch_recv, tpr_batch_abort,
    tpr_batch_control, tpr_batch_bulk, tpr_batch_bulk_done, NULL, NULL, NULL, NULL,
    TPR_CONTEXT_LANES,
};

static const tprpc_backend tpr_mpt_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "mpt",
    "Host memory in chunks over several connections of a network at a time.",
    1100, NULL, &tpr_mpt_table, NULL, NULL,
};
#endif // TPRPC_NO_MPT

// >>backends ----------------------------------------------------------------------------------------------------------
// The registry, one line a backend, and the creation and destruction of contexts, which read it.
//
// Uses: atomic, os, base, wire, timer, loop, context, transport, tcp, shm, channel, basic, xth, cma, bulk,
// mpt.
// Invariant: no backend's name appears anywhere below.

static const tprpc_backend *const tpr_backends_all[] = {
#ifndef TPRPC_NO_SHM
    &tpr_shm_backend,
#endif
#ifndef TPRPC_NO_TCP
    &tpr_tcp_backend,
#endif
#ifndef TPRPC_NO_XTH
    &tpr_xth_backend,
#endif
#ifndef TPRPC_NO_CMA
    &tpr_cma_backend,
#endif
#ifndef TPRPC_NO_BULK
    &tpr_bulk_backend,
#endif
#ifndef TPRPC_NO_MPT
    &tpr_mpt_backend,
#endif
    &tpr_basic_backend,
};

// Whether a user's backend is whole.
static tprpc_status tpr_backends_check(const tprpc_backend *backend, tprpc_error *error) {
    const char *name = backend && backend->name ? backend->name : "(no name)";
    uint32_t tables, size, want;
    if (!backend || backend->size != sizeof *backend || backend->version / 100 != TPRPC_VERSION / 100)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "backend %s was built for another version of tprpc.h",
                               name);
    tables = (backend->transport ? 1u : 0u) + (backend->channel ? 1u : 0u) + (backend->converter ? 1u : 0u);
    if (tables != 1)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "backend %s has not exactly one table", name);
    size = backend->transport ? backend->transport->size
           : backend->channel ? backend->channel->size
                              : backend->converter->size;
    want = backend->transport ? (uint32_t)sizeof(tprpc_transport_table)
           : backend->channel ? (uint32_t)sizeof(tprpc_channel_table) : (uint32_t)sizeof(tprpc_converter_table);
    if (size != want)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "backend %s's table has another size", name);
    if (backend->channel && backend->channel->max_descriptor > TPR_CHANNEL_DESCRIPTOR)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "backend %s: max_descriptor is %u, at most %d", name,
                               (unsigned)backend->channel->max_descriptor, TPR_CHANNEL_DESCRIPTOR);
    if (tpr_base_name_fault(backend->name, backend->name ? strlen(backend->name) : 0, 15) || strchr(backend->name, ','))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "backend %s: a name has 1 to 15 bytes and no comma",
                               name);
    return TPRPC_OK;
}

static tprpc_status tpr_backends_add(tprpc_context *ctx, const tprpc_backend *backend, tprpc_error *error) {
    tprpc_status status = tpr_backends_check(backend, error);
    if (status != TPRPC_OK) return status;
    uint32_t channels = backend->channel != NULL;
    for (uint32_t i = 0; i < ctx->backend_count; i++) {
        if (strcmp(ctx->backends[i].backend->name, backend->name) == 0)
            return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "two backends are named %s", backend->name);
        channels += ctx->backends[i].backend->channel != NULL;
    }
    if (ctx->backend_count == TPR_CONTEXT_BACKENDS)
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "more than %d backends", (int)TPR_CONTEXT_BACKENDS);
    if (channels > TPR_WIRE_CHANNELS)   // the ends of a pipe could not agree on all of them
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "more than %d channels", (int)TPR_WIRE_CHANNELS);
    ctx->backends[ctx->backend_count].backend = backend;
    ctx->backends[ctx->backend_count].priority = backend->priority;
    ctx->backend_count++;
    return TPRPC_OK;
}

static void tpr_backends_names(const tprpc_context *ctx, bool channels, char *out, size_t size) {
    size_t used = 0;
    out[0] = 0;
    for (uint32_t i = 0; i < ctx->backend_count && used < size; i++) {
        const tprpc_backend *backend = ctx->backends[i].backend;
        if (channels ? !backend->channel : !backend->transport) continue;
        used += (size_t)snprintf(out + used, size - used, "%s%s", used ? ", " : "", backend->name);
    }
}

// Orders transports, or channels, as the user's list does; what it leaves out is not used, what it names must be known.
static tprpc_status tpr_backends_apply(tprpc_context *ctx, const char *list, bool channels, tprpc_error *error) {
    char known[128];
    uint32_t found = 0, named = 1;
    if (!list) return TPRPC_OK;
    for (const char *p = list; *p; p++) named += *p == ',';
    for (uint32_t i = 0; i < ctx->backend_count; i++) {
        tpr_context_backend *entry = &ctx->backends[i];
        uint32_t rank = 0;
        if (channels ? !entry->backend->channel : !entry->backend->transport) continue;
        if (tpr_base_list_names(list, entry->backend->name, &rank)) {
            entry->priority = 1000000 - (int32_t)rank;
            found++;
        } else {
            entry->left_out = true;
            snprintf(entry->why, sizeof entry->why, "not among the %s given", channels ? "channels" : "transports");
        }
    }
    if (found == named) return TPRPC_OK;
    tpr_backends_names(ctx, channels, known, sizeof known);
    return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "unknown %s in \"%.60s\"; known are: %s",
                           channels ? "channel" : "transport", list, known);
}

static void tpr_backends_close(tprpc_context *ctx, tpr_context_backend *entry) {
    while (entry->opened > 0) {
        void *instance = entry->instances[--entry->opened];
        if (entry->backend->transport) entry->backend->transport->close(instance);
        if (entry->backend->channel) entry->backend->channel->close(instance);
    }
    tpr_context_free(ctx, entry->hosts, ctx->loop_count * sizeof *entry->hosts);
    entry->hosts = NULL;
    entry->viable = false;
}

// Opens an instance on every loop. That a backend is not viable here is no error; running out of something is.
static tprpc_status tpr_backends_open(tprpc_context *ctx, tpr_context_backend *entry, tprpc_error *error) {
    const tprpc_backend *backend = entry->backend;
    const tprpc_transport_table *t = backend->transport;
    const tprpc_channel_table *c = backend->channel;
    tprpc_error why = TPR_ZERO;
    if (backend->converter) entry->viable = true;
    if (backend->converter || (entry->left_out && backend->channel)) return TPRPC_OK;
    entry->hosts = (tprpc_host *)tpr_context_alloc(ctx, ctx->loop_count * sizeof *entry->hosts);
    if (!entry->hosts) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for backend %s", backend->name);
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        void **instance = &entry->instances[i];
        entry->hosts[i].size = (uint32_t)sizeof(tprpc_host);
        entry->hosts[i].loop = i;
        entry->hosts[i].context = ctx;
        const tprpc_status status = t ? t->open(&entry->hosts[i], backend->user, instance, &why)
                                      : c->open(&entry->hosts[i], backend->user, instance, &why);
        if (status != TPRPC_OK) {
            snprintf(entry->why, sizeof entry->why, "%.150s", why.text);
            if (status != TPRPC_ERROR_CANCELLED)
                TPR_LOG(&ctx->env.logger, TPRPC_LOG_INFO, "backends", "", "%s is not used: %s", backend->name,
                        entry->why);
            tpr_backends_close(ctx, entry);
            return TPRPC_OK;
        }
        entry->opened++;
    }
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        tpr_loop_source source = TPR_ZERO;
        intptr_t handle = -1;
        source.instance = entry->instances[i];
        source.progress = t ? t->progress : c->progress;
        source.arm = t ? t->arm : c->arm;
        if (t ? t->handle != NULL : c->handle != NULL)
            handle = t ? t->handle(source.instance) : c->handle(source.instance);
        tprpc_status status = tpr_loop_add_source(&ctx->loops[i], source, handle, error);
        if (status != TPRPC_OK) return status;
    }
    entry->viable = !entry->left_out;
    return TPRPC_OK;
}

// Gives back whatever of a context there is; its loops hold no object any more.
static void tpr_backends_free_context(tprpc_context *ctx) {
    tpr_base_memory memory;
    tpr_context_stop_threads(ctx);
    for (uint32_t i = 0; i < ctx->loop_count; i++) {   // a source is not driven while backends close
        ctx->loops[i].source_count = 0;
        tpr_loop_drain(&ctx->loops[i]);
    }
    for (uint32_t i = ctx->backend_count; i-- > 0;) tpr_backends_close(ctx, &ctx->backends[i]);
    for (uint32_t i = 0; i < ctx->loop_count; i++) tpr_loop_fini(&ctx->loops[i]);
    tpr_context_free(ctx, ctx->loops, ctx->loop_count * sizeof *ctx->loops);
    tpr_context_free(ctx, ctx->threads, ctx->loop_count * sizeof *ctx->threads);
    tpr_base_log_flush(&ctx->env.logger);
    tpr_context_free(ctx, ctx->env.logger.lines, TPR_BASE_LOG_LINES * sizeof(tpr_base_log_line));
    tpr_os_fork_page_free(ctx->env.fork_page);
    memory = ctx->env.memory;
    tpr_base_free(&memory, ctx, sizeof *ctx, (uint32_t)TPR_CONTEXT_TAG);
}

// What a context has before its backends: hooks, limits, loops.
static tprpc_status tpr_backends_found(tprpc_context *ctx, const tprpc_context_desc *desc, tprpc_error *error) {
    uint32_t loops = desc->threads > 0 ? (uint32_t)desc->threads : 1;
    ctx->submit = desc->submit;
    ctx->thread_begin = desc->thread_begin;
    ctx->thread_end = desc->thread_end;
    ctx->user = ctx->env.user = ctx->env.logger.user = desc->user;
    ctx->env.clock_us = desc->clock_us;
    ctx->env.spin_us = tpr_context_time(desc->spin_us, 50);
    if (ctx->env.spin_us < 0) ctx->env.spin_us = INT64_MAX / 4;
    ctx->env.polled = desc->threads == 0;
    if (desc->let_read) tpr_os_let_read();
    ctx->env.nesting = ctx->limits.nesting;
    ctx->lanes = desc->lanes ? (uint32_t)desc->lanes : 1;
    ctx->ordered_channels = desc->channels != NULL;
    if (desc->log) {
        ctx->env.logger.lines =
            (tpr_base_log_line *)tpr_context_alloc(ctx, TPR_BASE_LOG_LINES * sizeof(tpr_base_log_line));
        if (!ctx->env.logger.lines) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for the log");
        ctx->env.logger.log = desc->log;
    }
    ctx->env.fork_page = tpr_os_fork_page();
    if (ctx->env.fork_page) *ctx->env.fork_page = 1;
    if (tpr_os_random(ctx->nonce, sizeof ctx->nonce) != 0)
        return tpr_base_os_error(error, errno, "reading", "random bytes");
    ctx->process_space = tpr_os_process_space();
    ctx->loops = (tpr_loop *)tpr_context_alloc(ctx, loops * sizeof *ctx->loops);
    ctx->threads = (tpr_context_thread *)tpr_context_alloc(ctx, loops * sizeof *ctx->threads);
    if (!ctx->loops || !ctx->threads) {
        tpr_context_free(ctx, ctx->loops, loops * sizeof *ctx->loops);
        tpr_context_free(ctx, ctx->threads, loops * sizeof *ctx->threads);
        ctx->loops = NULL;
        ctx->threads = NULL;
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for %u loops", (unsigned)loops);
    }
    for (uint32_t i = 0; i < loops; i++) {
        tprpc_status status = tpr_loop_init(&ctx->loops[i], &ctx->env, ctx, i, error);
        if (status != TPRPC_OK) {   // free_context must see matching sizes
            for (uint32_t j = 0; j < i; j++) tpr_loop_fini(&ctx->loops[j]);
            tpr_context_free(ctx, ctx->loops, loops * sizeof *ctx->loops);
            tpr_context_free(ctx, ctx->threads, loops * sizeof *ctx->threads);
            ctx->loops = NULL;
            ctx->threads = NULL;
            return status;
        }
    }
    ctx->loop_count = loops;
    return TPRPC_OK;
}

static tprpc_status tpr_backends_all_in(tprpc_context *ctx, const tprpc_context_desc *desc, tprpc_error *error) {
    tprpc_status status = TPRPC_OK;
    bool transport = false;
    for (size_t i = 0; i < desc->backend_count && status == TPRPC_OK; i++)
        status = tpr_backends_add(ctx, desc->backends ? desc->backends[i] : NULL, error);
    for (size_t i = 0; i < TPR_COUNT(tpr_backends_all) && status == TPRPC_OK; i++)
        status = tpr_backends_add(ctx, tpr_backends_all[i], error);
    if (status == TPRPC_OK) status = tpr_backends_apply(ctx, desc->transports, false, error);
    if (status == TPRPC_OK) status = tpr_backends_apply(ctx, desc->channels, true, error);
    for (uint32_t i = 0; i < ctx->backend_count && status == TPRPC_OK; i++) {
        status = tpr_backends_open(ctx, &ctx->backends[i], error);
        transport |= ctx->backends[i].viable && ctx->backends[i].backend->transport;
    }
    if (status != TPRPC_OK || transport) return status;
    for (uint32_t i = 0; i < ctx->backend_count; i++)
        if (ctx->backends[i].backend->transport)
            return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "no transport is viable here; %s: %s",
                                   ctx->backends[i].backend->name, ctx->backends[i].why);
    return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "no transport was built in");
}

static void tpr_backends_info(const tprpc_context *ctx, const tpr_context_backend *entry, tprpc_backend_info *out) {
    const tprpc_backend *backend = entry->backend;
    memset(out, 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "%s", backend->name);
    snprintf(out->why, sizeof out->why, "%s", entry->viable ? "" : entry->why);
    out->summary = backend->summary;
    out->kind = backend->transport ? TPRPC_BACKEND_TRANSPORT
                : backend->channel ? TPRPC_BACKEND_CHANNEL : TPRPC_BACKEND_CONVERTER;
    out->priority = entry->priority;
    out->viable = entry->viable;
    if (!entry->viable || backend->converter) return;
    size_t (*domain)(void *, uint8_t *, size_t) = backend->transport ? backend->transport->domain
                                                                     : backend->channel->domain;
    tpr_loop_enter(&ctx->loops[0]);
    out->domain_size = (uint32_t)domain(entry->instances[0], out->domain, sizeof out->domain);
    tpr_loop_leave(&ctx->loops[0]);
}

static bool tpr_backends_loop_empty(void *arg) {
    return tpr_base_list_empty(&((tpr_loop *)arg)->objects) && !((tpr_loop *)arg)->callbacks.head;
}

// ---- public

TPR_COLD
TPRPC_API tprpc_status tprpc_context_create_for(const tprpc_context_desc *desc, size_t desc_size, int32_t version,
                                                tprpc_context **out, tprpc_error *error) {
    static const tprpc_context_desc defaults = TPR_ZERO;
    tpr_base_memory memory;
    tprpc_limits limits;
    tprpc_status status;
    TPRPC_ASSERT(out);
    if (!out) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_context_create: out is NULL");
    *out = NULL;
    if (desc_size != sizeof *desc || version / 100 != TPRPC_VERSION / 100)
        return tprpc_error_set(
            error, TPRPC_ERROR_INVALID, 0,
            "the caller was built with tprpc.h %d and a context descriptor of %zu bytes, the library "
            "is %d with %zu: build both from one tprpc.h",
            (int)version, desc_size, TPRPC_VERSION, sizeof *desc);
    if (!desc) desc = &defaults;
    if (!desc->allocator.alloc != !desc->allocator.free)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "an allocator has both alloc and free");
    if (desc->threads < 0 || desc->threads > TPR_CONTEXT_LOOPS)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "threads is %d, not 0 to %d", (int)desc->threads,
                               TPR_CONTEXT_LOOPS);
    if (desc->lanes < 0 || desc->lanes > TPR_CONTEXT_LANES)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "lanes is %d, not 0 to %d", (int)desc->lanes,
                               TPR_CONTEXT_LANES);
    limits = desc->limits;
    tpr_context_limits(&limits);
    memset(&memory, 0, sizeof memory);
    memory.hooks = desc->allocator;
    memory.limit = limits.memory_bytes;
    if (!memory.hooks.alloc) {
        memory.hooks.alloc = tpr_base_default_alloc;
        memory.hooks.free = tpr_base_default_free;
    }
    tprpc_context *ctx = (tprpc_context *)tpr_base_new(&memory, sizeof *ctx, (uint32_t)TPR_CONTEXT_TAG);
    if (!ctx) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a context");
    ctx->env.memory = memory;
    ctx->limits = limits;
    status = tpr_backends_found(ctx, desc, error);
    if (status == TPRPC_OK) status = tpr_backends_all_in(ctx, desc, error);
    if (status == TPRPC_OK && desc->threads > 0) status = tpr_context_start_threads(ctx, error);
    if (status != TPRPC_OK) tpr_backends_free_context(ctx);
    else *out = ctx;
    return status;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_context_destroy(tprpc_context *ctx) {
    if (!ctx) return TPRPC_OK;
    if (!tpr_context_usable(ctx) || TPR_ATOMIC_LOAD(&ctx->agents) || tpr_context_in_callback(ctx))
        return TPRPC_ERROR_INVALID;
    tpr_context_stop_threads(ctx);
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        tpr_loop *loop = &ctx->loops[i];
        tpr_base_list closing;
        tpr_loop_enter(loop);
        loop->stopping = false;
        tpr_base_list_init(&closing);
        while (!tpr_base_list_empty(&loop->objects)) {
            tpr_base_list *node = loop->objects.next;
            tpr_base_list_remove(node);
            tpr_base_list_add(&closing, node);
        }
        while (!tpr_base_list_empty(&closing)) {   // one that closes may free others: only the first is looked at
            tpr_base_list *node = closing.next;
            tpr_loop_object *object = TPR_CONTAINER(node, tpr_loop_object, node);
            tpr_base_list_remove(node);
            tpr_base_list_add(&loop->objects, node);
            object->close(object);
        }
        bool empty = tpr_loop_wait(loop, tpr_backends_loop_empty, loop, tpr_loop_clock(loop) + 30000000);
        tpr_loop_leave(loop);
        if (!empty) return TPRPC_ERROR_TIMEOUT;
    }
    tpr_backends_free_context(ctx);
    return TPRPC_OK;
}

TPR_COLD
TPRPC_API size_t tprpc_context_get_backends(tprpc_context *ctx, tprpc_backend_info *out, size_t capacity, size_t size) {
    TPRPC_ASSERT(ctx && (out || !capacity));
    if (!tpr_context_usable(ctx) || (!out && capacity) || size != sizeof *out) return 0;
    for (uint32_t i = 0; i < ctx->backend_count && i < capacity; i++)
        tpr_backends_info(ctx, &ctx->backends[i], &out[i]);
    return ctx->backend_count;
}

// >>pipe --------------------------------------------------------------------------------------------------------------
// Ordered messages between two ends: the choice of transport and channels, framing, credit, transfers, listeners.
//
// A pipe begins as a connection on the address it was given. The ends say hello, the connector moves the pipe to the
// best transport that both have, they prove the channels, and it is open. Messages travel in frames under a credit
// window, so a reader who does not read stalls the writer's messages alone: control frames and the bulk of channels,
// which is asked for by the receiver, are always taken in.
//
// Uses: atomic, os, base, wire, timer, process, loop, context, transport, channel.
// Invariant: every operation of a user's, every transfer and every write is in a list of its pipe until it ends, and
// it ends once; a pipe is freed when its user closed it and nothing of it is left (refs is 0).

enum {
    TPR_PIPE_WINDOW = 1 << 20,         // bytes of message frames that may be sent and not yet consumed
    TPR_PIPE_INLINE = 8 << 10,         // host buffers up to here travel within the message, if no channel says else,
    TPR_PIPE_INLINE_ALL = 32 << 10,    // up to so many in all
    TPR_PIPE_CHUNK = (256 << 10) - 64,   // of bulk, so that with its header it is no more than 256 KiB
    TPR_PIPE_LARGE = 256 << 10,        // bulk from here on goes over lanes
    TPR_PIPE_RATED = 1 << 20,          // a batch from here on tells how fast its channel is:
    TPR_PIPE_RATED_TRIES = 3,          // so many of each channel, and then
    TPR_PIPE_RATED_AGAIN = 64,         // one of so many, by another than the fastest
    TPR_PIPE_LANE_MS = 2000,           // that one may take to come; after a failure another is tried after
    TPR_PIPE_LANE_RETRY_US = 1000000,  // this time, which doubles up to six times
    TPR_PIPE_DRAIN = 64 << 20,         // bytes that may have come before it ended
    TPR_PIPE_STACK = 1024,             // frames up to here are built and parsed on the stack
    TPR_PIPE_ROUND = 1 << 20,          // bytes handled in one go before others have a turn
    TPR_PIPE_SHORT = 256,              // metadata up to here, without tensors, takes the short path
    TPR_PIPE_BATCH = 64,               // messages taken in before callbacks have a turn: they are still in the cache
    TPR_PIPE_HANDSHAKE_MS = 10000, TPR_PIPE_MOVE_MS = 2000,
    TPR_PIPE_PATIENCE_US = 1000000,    // with one that has said hello and takes a place from others
    TPR_PIPE_MOURN_MS = 100            // that nothing comes any more from a process that has ended
};

typedef enum tpr_pipe_state {
    TPR_PIPE_CONNECTING,               // the transport connects
    TPR_PIPE_GREETING,                 // hello said, the other's awaited
    TPR_PIPE_MOVING,                   // connector: a better transport is tried
    TPR_PIPE_AGREEING,                 // channels are proven
    TPR_PIPE_OPEN,
    TPR_PIPE_ENDED                     // error says why
} tpr_pipe_state;

typedef struct tpr_pipe_frame {        // bytes on their way out, in one block
    struct tpr_pipe_frame *next;
    uint32_t size, sent, block;        // bytes follow the struct; block: of the whole allocation
    uint32_t cost;                     // of the credit window; 0: not a message
    uint32_t handle_count;
    struct tpr_pipe_write *write;      // told when all was taken
    intptr_t handles[TPR_OS_HANDLES];  // duplicates, closed when sent
} tpr_pipe_frame;

typedef struct tpr_pipe_frames { tpr_pipe_frame *head, **tail; } tpr_pipe_frames;

typedef struct tpr_pipe_bulk {         // a channel's bulk on its way out
    struct tpr_pipe_bulk *next;
    uint64_t transfer, offset;
    const uint8_t *data;
    size_t   size;                     // that is in no chunk yet
    uint32_t chunks, lanes;            // chunks on their way; lanes that it may go over; 0: the pipe's own connection
    uint16_t channel;
    tprpc_work *taken;
} tpr_pipe_bulk;

typedef struct tpr_pipe_transfer {     // a channel's transfer of one message
    tpr_channel_transfer base;         // first
    tpr_base_list node;                // of the pipe
    tprpc_pipe *pipe;
    struct tpr_pipe_write *write;      // one of the two
    struct tpr_pipe_in *in;
    const tpr_context_backend *holder; // of an incoming message: the channel that shows the sender's memory in place
    void    *hold;                     // until it is let go; NULL: it shows none
    uint16_t channel;
    bool large, torn;                  // of a receive: its bulk may come over lanes; some of that was lost
    uint64_t place;                    // of a receive: how many the pipe began before
    int64_t  begun_us;                 // of a send that is rated, when it began; else 0
    uint64_t bytes;                    // likewise
} tpr_pipe_transfer;

typedef struct tpr_pipe_keep {         // a tensor on a device, on its way out
    const tpr_context_backend *entry;  // its converter
    tprpc_device device;
    void  *copy, *stream, *keep;       // copy: NULL when the user lent it
    size_t size;
    bool   prepared;
} tpr_pipe_keep;

typedef struct tpr_pipe_write tpr_pipe_write;
struct tpr_pipe_write {                // one write until nothing of its memory is needed
    tpr_base_list node;                // of the pipe
    tprpc_pipe *pipe;
    void (*ended)(tpr_pipe_write *write);   // under the lock; status and error are set; frees it
    uint32_t pending;                  // the frame, and each transfer
    tprpc_status status;
    tprpc_error error;
    void *copy;                        // of the message, when it could not leave at once and was not lent
    size_t copy_size;
    const tprpc_message *parked;       // waits for the pipe to open (in copy)
    struct tpr_pipe_keep *keeps;       // keep_count of them: tensors on devices, as their converters hold them
    uint32_t keep_count;
    uint8_t prefix[TPR_WIRE_PREFIX];
    uint8_t prefix_size, transfer_count;
    tpr_pipe_transfer transfers[TPR_WIRE_CHANNELS];
};

typedef struct tpr_pipe_slot {         // one payload or tensor of an incoming message
    void    *bytes;                    // inline, in the message's block; or the sender's, adopted
    void    *owned;                    // allocated by the library for what came by a channel
    size_t   owned_size;
    const tpr_context_backend *converter;   // that gave it, NULL: host memory
    void    *stream;                   // of the converter's memory
    tprpc_device device;
    uint8_t  transfer;
} tpr_pipe_slot;

typedef struct tpr_pipe_in tpr_pipe_in;
struct tpr_pipe_in {                   // an incoming message, with its inline bytes, in one block
    tpr_base_list node;                // of the pipe's `arrived`
    tprpc_pipe *pipe;
    tpr_loop   *loop;
    tprpc_message message;             // data pointers are set when it is read
    tprpc_tensor  *tensors;
    tprpc_payload *payloads;
    tpr_pipe_slot *slots;              // payloads, then tensors
    uint32_t block, credit, pending, transfer_count;
    bool     described, reading;
    uint8_t  prefix_size;
    uint8_t  prefix[TPR_WIRE_PREFIX];
    tprpc_status status;
    tprpc_error  error;                // valid when status is not OK
    void (*done)(tpr_pipe_in *in);     // under the lock: the read ended
    void *user;
    tpr_pipe_transfer *transfers;
    tpr_wire_transfer *wire;           // ids and descriptors, in the block
};

typedef struct tpr_pipe_user {         // who uses a pipe below the public functions; called under the lock
    void (*opened)(struct tpr_pipe_user *user);
    void (*message)(struct tpr_pipe_user *user, tpr_pipe_in *in);   // becomes the user's, who frees it
    void (*ended)(struct tpr_pipe_user *user);                      // pipe->error says why; once
} tpr_pipe_user;

enum { TPR_PIPE_ACCEPT, TPR_PIPE_WRITE, TPR_PIPE_DESCRIBE, TPR_PIPE_READ };
typedef struct tpr_pipe_op {           // an operation of a user's until its callback has run
    tpr_loop_task task;
    tpr_base_list node;
    tprpc_pipe *pipe;
    struct tprpc_listener *listener;   // of an accept
    int32_t kind;
    bool finished;
    tprpc_status status;
    tprpc_error error;
    tpr_pipe_in *in;
    tpr_pipe_write write;              // of a write
    void (*release)(void *user);
    void *release_user, *user;
    union { tprpc_accepted accepted; tprpc_written written; tprpc_described described; tprpc_read read; } fn;
    tprpc_message *allocation;         // of a read that waits for its message; in a block of allocation_size
    size_t allocation_size;
} tpr_pipe_op;

typedef struct tpr_pipe_channel {      // the end of a channel on a pipe
    tprpc_link link;                   // first
    tprpc_pipe *pipe;
    const tpr_context_backend *entry;
    void    *end;
    uint16_t index;
    bool     proved, verdict;          // the twin proved that it reads us; it says that we proved that we read it
    uint32_t tries, rate;              // large batches sent, where it is rated; bytes a microsecond of the fast ones
    char     why[110];                 // it has no end, or is not proved
} tpr_pipe_channel;

typedef struct tpr_pipe_conn {         // one connection of a pipe, with the frames on their way out and in
    tprpc_conn_owner owner;            // first
    tprpc_pipe *pipe;
    const tpr_context_backend *entry;
    void *conn;                        // NULL: none
    // out
    tpr_pipe_bulk *bulk;               // what the chunk is of
    const uint8_t *data;
    uint8_t  chunk_header[TPR_WIRE_HEADER + TPR_WIRE_DATA_HEADER];
    uint32_t chunk_size, chunk_sent;   // of the chunk on its way, header included
    uint64_t bulk_sent, bulk_received;   // bytes in chunks that were cut, or came whole
    // in
    uint8_t  header[TPR_WIRE_HEADER + TPR_WIRE_DATA_HEADER];
    uint32_t header_have, body_have;
    tpr_wire_frame frame;
    void    *dest;                     // where a chunk of bulk goes; NULL: nowhere
    uint64_t data_transfer, data_offset;
} tpr_pipe_conn;

typedef enum tpr_pipe_lane_state {
    TPR_PIPE_LANE_NONE,                // or both ends have said that it ended: another may be made
    TPR_PIPE_LANE_CONNECTING,          // connector: LANE is not said yet; the other end knows nothing of it
    TPR_PIPE_LANE_ASKED,               // LANE is said, or who listened has said LANED: the other's LANED is awaited
    TPR_PIPE_LANE_OPEN,
    TPR_PIPE_LANE_ENDED                // LOST is said, the other end's is awaited
} tpr_pipe_lane_state;

typedef struct tpr_pipe_lane {         // a connection beside the pipe's own, for large bulk; lives as long as the pipe
    tpr_pipe_conn conn;                // first
    uint32_t   number;                 // from 1 on
    tpr_pipe_lane_state state;
    uint8_t    nonce[16];              // of the one that is there, or was last
    uint64_t   until;                  // of one that ended: receives that the pipe had begun
    tprpc_work timer;                  // until it is open
    uint8_t    answer[TPR_WIRE_HEADER + TPR_WIRE_LANE_BYTES];
} tpr_pipe_lane;

struct tprpc_pipe {
    tpr_loop_object object;
    tpr_loop       *loop;
    tprpc_context  *ctx;
    struct tprpc_listener *listener;   // that it came in by, until it is accepted
    tpr_base_list   listener_node;
    tpr_pipe_user  *user;
    uint32_t        refs, busy;        // what hangs from it; callbacks running
    tpr_pipe_state  state;
    bool            connector, ordered, insecure, closed, handed, pumping, resume_set, old_lost, orphaned, parting;
    uint32_t        agreed_step;       // the last of the peer's steps of the proof
    tprpc_status    status;
    tpr_pipe_conn   now, next;         // what carries it; what it moves to
    tprpc_work      timer, resume;
    tpr_process_watch process;         // the peer's, where its transport does not watch it
    uint64_t        heard;             // orphaned, that has ended: bytes_received when the timer was set
    uint8_t         token[16], nonce[16];
    uint64_t        message_bytes, metadata_bytes;   // the lesser of both ends' limits
    uint32_t        tensors, tried;    // tried: backends that a move was tried to
    uint32_t        inline_bytes;      // host buffers up to here travel within the message
    uint32_t        offered, reached;  // of ctx->backends: the peer offers it; it is within reach
    tpr_wire_hello *hello;             // the peer's, while it matters
    // out
    tpr_pipe_frames urgent, messages;  // control; what waits for credit or room
    tpr_pipe_bulk  *bulk, **bulk_tail;
    tpr_pipe_frame *current;           // partly sent
    uint64_t        sent, granted;     // bytes of message frames sent; that the peer has consumed
    uint32_t        rated;             // batches that tell how fast a channel is; the last one's
    int64_t         rated_us;          // end
    uint64_t        queued_bytes, next_transfer;
    // in
    uint8_t        *body;              // of a frame that did not come in one piece
    uint32_t        body_block;
    intptr_t        handles[TPR_OS_HANDLES];
    uint32_t        handle_count;
    uint64_t        consumed, told;    // bytes of message frames read by the user; as the peer knows
    tpr_base_list   arrived;           // messages not yet read
    tpr_base_list   reads, writes, write_ops, transfers;
    tpr_base_list  *waiting;           // the first of `reads` that has no message yet, or &reads
    tpr_pipe_channel *channels[TPR_WIRE_CHANNELS];
    uint32_t        channel_count;
    // lanes
    tpr_pipe_lane  *lanes[TPR_CONTEXT_LANES];   // NULL: never there
    uint32_t        lanes_open, lanes_wanted;   // a bit each
    uint32_t        lanes_failed;      // in a row
    uint64_t        lanes_made, receives;   // lanes that it tried to make; transfers that it began to receive
    uint16_t        peer_minor;
    uint8_t         peer_token[16];
    int64_t         lanes_retry_us;    // none is tried before
    struct tprpc_listener *home;       // that lanes come in by, and this pipe's place there
    tpr_base_list   home_node;
    tprpc_error     error;             // why it ended, or parts
    uint32_t        moved_have;        // of the peer's word on the connection that it moves to,
    uint8_t         moved[TPR_WIRE_HEADER + 36];   // which may come in pieces
    char            move_why[110], lane_why[110];   // why it was not moved, why a lane is missing
    char            address[TPR_WIRE_ADDRESS + 18]; // where it connects to, or where it moved to
    uint64_t bytes_sent, bytes_received, tensor_bytes_sent, tensor_bytes_received, messages_sent, messages_received;
    uint64_t        tensor_bytes_adopted;
    uint64_t        fast_messages, fallbacks;   // fallbacks: of sends, to the next channel
    uint64_t        idle_turns;        // the loop's, when messages were taken in last
};

typedef struct tpr_pipe_listen {       // one address of a listener
    tprpc_listen_owner owner;          // first
    struct tprpc_listener *listener;
    const tpr_context_backend *entry;
    void *handle;
    bool  given;                       // by the user; otherwise only for pipes that move
    char  address[TPR_WIRE_ADDRESS];   // "name://rest"
} tpr_pipe_listen;

enum { TPR_PIPE_ADDRESSES = 16 };
struct tprpc_listener {
    tpr_loop_object object;
    tpr_loop      *loop;
    tprpc_context *ctx;
    bool           ordered, insecure, closed;
    uint32_t       refs, greetings, busy;
    uint32_t       count;
    tpr_pipe_listen addresses[TPR_PIPE_ADDRESSES];
    tpr_base_list  greeting_list, pipes, ready, accepts;   // not yet known; not yet open; open; asked for
    tpr_base_list  members;            // pipes that came in by it, and
    tpr_base_map   by_token;           // likewise, by the first 8 bytes of that
    tpr_pipe_user *(*user_for)(void *arg, tprpc_pipe *pipe);   // an agent's: takes pipes as they come
    void          *user_arg;
};

typedef struct tpr_pipe_greeting {     // an incoming connection whose first frame has not come
    tprpc_conn_owner owner;            // first
    tpr_base_list node;
    struct tprpc_listener *listener;
    const tpr_context_backend *entry;
    void    *conn;
    tprpc_work timer;
    uint32_t have;
    uint8_t  bytes[TPR_WIRE_HEADER + TPR_WIRE_FIRST];
} tpr_pipe_greeting;

static void tpr_pipe_end(tprpc_pipe *pipe, tprpc_status status, int32_t os_code, const char *why, ...)
    __attribute__((format(printf, 4, 5)));
static void tpr_pipe_pump_out(tprpc_pipe *pipe);
static void tpr_pipe_pump_in(tprpc_pipe *pipe);
static void tpr_pipe_on_hello(tprpc_pipe *pipe, const uint8_t *body, size_t size);
static void tpr_pipe_on_agree(tprpc_pipe *pipe, const uint8_t *body, size_t size);
static void tpr_pipe_match(tprpc_pipe *pipe);
static void tpr_pipe_in_free(tpr_pipe_in *in);
static void tpr_pipe_listener_lost(tprpc_pipe *pipe);
static void tpr_pipe_listener_open(tprpc_pipe *pipe);
static void tpr_pipe_timed_out(tprpc_work *work);
static void tpr_pipe_take_conn(tprpc_pipe *pipe, const tpr_context_backend *entry, void *conn);
static void tpr_pipe_set_timer(tprpc_pipe *pipe, int64_t ms);
static void tpr_pipe_process_ended(tpr_process_watch *watch);
static void tpr_pipe_lanes_want(tprpc_pipe *pipe, uint32_t count);
static bool tpr_pipe_on_lost(tprpc_pipe *pipe, const uint8_t *body, size_t size);
static void tpr_pipe_lanes_end(tprpc_pipe *pipe, tprpc_status cause);
static void tpr_pipe_part(tprpc_pipe *pipe, tprpc_status status, int32_t os_code, const char *text);
static void tpr_pipe_rate(tpr_pipe_transfer *transfer);

static inline const tprpc_transport_table *tpr_pipe_table(const tpr_pipe_conn *conn) {
    return conn->entry->backend->transport;
}

// What a message about this pipe calls its peer.
TPR_COLD static void tpr_pipe_peer(tprpc_pipe *pipe, char *out, size_t size) {
    char peer[64] = "";
    if (pipe->now.conn) tpr_pipe_table(&pipe->now)->peer(pipe->now.conn, peer, sizeof peer);
    snprintf(out, size, "%s%s%s", pipe->now.entry ? pipe->now.entry->backend->name : "", peer[0] ? " " : "", peer);
}

// ---- life

TPR_COLD static void tpr_pipe_free(tprpc_pipe *pipe) {
    tprpc_context *ctx = pipe->ctx;
    while (!tpr_base_list_empty(&pipe->arrived)) {
        tpr_pipe_in *in = TPR_CONTAINER(pipe->arrived.next, tpr_pipe_in, node);
        tpr_base_list_remove(&in->node);
        tpr_pipe_in_free(in);
    }
    for (uint32_t i = 0; i < pipe->channel_count; i++) {
        tpr_pipe_channel *channel = pipe->channels[i];
        if (channel->end) channel->entry->backend->channel->detach(channel->end);
        tpr_context_free(ctx, channel, sizeof *channel);
    }
    for (uint32_t i = 0; i < TPR_CONTEXT_LANES; i++) tpr_context_free(ctx, pipe->lanes[i], sizeof *pipe->lanes[i]);
    tpr_timer_cancel(&pipe->loop->wheel, &pipe->timer);
    tpr_context_free(ctx, pipe->hello, sizeof *pipe->hello);
    tpr_base_list_remove(&pipe->listener_node);
    tpr_base_list_remove(&pipe->object.node);
    tpr_base_pool_free(&pipe->loop->pool, pipe->body, pipe->body_block);
    TPR_ATOMIC_SUB(&ctx->pipes, 1u);
    tpr_context_free(ctx, pipe, sizeof *pipe);
}

static inline void tpr_pipe_unref(tprpc_pipe *pipe) {
    if (--pipe->refs == 0 && pipe->closed) tpr_pipe_free(pipe);
}

// Gives the pipe up for its user; under the lock.
static void tpr_pipe_drop(tprpc_pipe *pipe) {
    pipe->refs++;
    pipe->closed = true;
    pipe->user = NULL;
    tpr_pipe_end(pipe, TPRPC_ERROR_CLOSED, 0, "the pipe was closed");
    tpr_pipe_unref(pipe);
}

static void tpr_pipe_object_close(tpr_loop_object *object) { tpr_pipe_drop(TPR_CONTAINER(object, tprpc_pipe, object)); }

// ---- writes

static void tpr_pipe_write_begin(tprpc_pipe *pipe, tpr_pipe_write *write, void (*ended)(tpr_pipe_write *)) {
    write->pipe = pipe;
    write->ended = ended;
    write->pending = 1;               // dropped by whoever begins it
    write->status = TPRPC_OK;
    write->copy = NULL;
    write->parked = NULL;
    write->keeps = NULL;
    write->keep_count = 0;
    write->prefix_size = write->transfer_count = 0;
    tpr_base_list_add(&pipe->writes, &write->node);
    pipe->refs++;
}

static inline tprpc_device tpr_pipe_device(tprpc_device device) {
    if (device.kind == TPRPC_DEVICE_DEFAULT) device.kind = TPRPC_CPU;
    return device;
}

static bool tpr_pipe_on_host(const tprpc_tensor *tensor) { return tpr_pipe_device(tensor->device).kind == TPRPC_CPU; }

static const tpr_context_backend *tpr_pipe_converter(const tprpc_context *ctx, int32_t kind) {
    for (uint32_t i = 0; i < ctx->backend_count; i++)
        if (ctx->backends[i].backend->converter && ctx->backends[i].backend->converter->kind == kind)
            return &ctx->backends[i];
    return NULL;
}

// Gives back what a write holds: its copy of the message, and what converters hold for it.
static void tpr_pipe_write_let_go(tpr_pipe_write *write) {
    tprpc_pipe *pipe = write->pipe;
    for (uint32_t i = 0; i < write->keep_count; i++) {
        const tpr_pipe_keep *keep = &write->keeps[i];
        const tprpc_backend *backend = keep->entry ? keep->entry->backend : NULL;
        if (keep->prepared) backend->converter->sent(backend->user, pipe->ctx, keep->keep);
        if (keep->copy)
            backend->converter->release(backend->user, pipe->ctx, keep->device, keep->copy, keep->size, keep->stream);
    }
    tpr_base_pool_free(&pipe->loop->pool, write->keeps, write->keep_count * sizeof *write->keeps);
    if (!write->copy) return;
    pipe->queued_bytes -= write->copy_size;
    tpr_base_pool_free(&pipe->loop->pool, write->copy, write->copy_size);
}

static void tpr_pipe_write_done(tpr_pipe_write *write, tprpc_status status, const tprpc_error *error) {
    tprpc_pipe *pipe = write->pipe;
    if (status != TPRPC_OK && write->status == TPRPC_OK) {
        write->status = status;
        if (error) write->error = *error;
        else tprpc_error_set(&write->error, status, 0, "the write failed");
    }
    if (--write->pending) return;
    tpr_base_list_remove(&write->node);
    tpr_pipe_write_let_go(write);
    write->ended(write);
    tpr_pipe_unref(pipe);
}

static size_t tpr_pipe_round_up(size_t size) { return (size + 63) & ~(size_t)63; }

// The bytes that a copy of a message takes: arrays and metadata, and with `deep` the payloads and host tensors too.
static size_t tpr_pipe_copy_size(const tprpc_message *m, bool deep) {
    size_t size = tpr_pipe_round_up(sizeof *m) + tpr_pipe_round_up(m->metadata_size) +
                  tpr_pipe_round_up(m->tensor_count * sizeof *m->tensors) +
                  tpr_pipe_round_up(m->payload_count * sizeof *m->payloads);
    for (size_t i = 0; i < m->tensor_count; i++)
        size += tpr_pipe_round_up(m->tensors[i].metadata_size) +
                (deep && tpr_pipe_on_host(&m->tensors[i]) ? tpr_pipe_round_up(m->tensors[i].size) : 0);
    for (size_t i = 0; i < m->payload_count; i++)
        size += tpr_pipe_round_up(m->payloads[i].metadata_size) + (deep ? tpr_pipe_round_up(m->payloads[i].size) : 0);
    return size;
}

static void *tpr_pipe_copy_part(uint8_t **at, const void *bytes, size_t size) {
    void *to = *at;
    tpr_base_copy(to, bytes, size);
    *at += tpr_pipe_round_up(size);
    return to;
}

static tprpc_message *tpr_pipe_copy_message(void *block, const tprpc_message *m, bool deep) {
    uint8_t *at = (uint8_t *)block;
    tprpc_message *copy = (tprpc_message *)tpr_pipe_copy_part(&at, m, sizeof *m);
    tprpc_tensor *tensors = (tprpc_tensor *)tpr_pipe_copy_part(&at, m->tensors, m->tensor_count * sizeof *m->tensors);
    tprpc_payload *payloads =
        (tprpc_payload *)tpr_pipe_copy_part(&at, m->payloads, m->payload_count * sizeof *m->payloads);
    copy->tensors = tensors;
    copy->payloads = payloads;
    copy->metadata = tpr_pipe_copy_part(&at, m->metadata, m->metadata_size);
    for (size_t i = 0; i < m->tensor_count; i++) {
        tensors[i].metadata = tpr_pipe_copy_part(&at, m->tensors[i].metadata, m->tensors[i].metadata_size);
        if (deep && tpr_pipe_on_host(&tensors[i]))
            tensors[i].data = tpr_pipe_copy_part(&at, m->tensors[i].data, m->tensors[i].size);
    }
    for (size_t i = 0; i < m->payload_count; i++) {
        payloads[i].metadata = tpr_pipe_copy_part(&at, m->payloads[i].metadata, m->payloads[i].metadata_size);
        if (deep) payloads[i].data = tpr_pipe_copy_part(&at, m->payloads[i].data, m->payloads[i].size);
    }
    return copy;
}

// Makes the write its own copy of the message, counted against the pipe's limit. deep: bytes too.
static const tprpc_message *tpr_pipe_write_copy(tpr_pipe_write *write, const tprpc_message *message, bool deep,
                                                tprpc_error *error) {
    tprpc_pipe *pipe = write->pipe;
    size_t size = tpr_pipe_copy_size(message, deep);
    if (pipe->queued_bytes + size > pipe->ctx->limits.inflight_bytes) {
        tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "the pipe holds %llu bytes on their way and may hold %llu",
                        (unsigned long long)pipe->queued_bytes, (unsigned long long)pipe->ctx->limits.inflight_bytes);
        return NULL;
    }
    write->copy = tpr_base_pool_alloc(&pipe->loop->pool, size);
    if (!write->copy) {
        tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for %zu bytes of a message", size);
        return NULL;
    }
    write->copy_size = size;
    pipe->queued_bytes += size;
    return tpr_pipe_copy_message(write->copy, message, deep);
}

// ---- frames out

static void tpr_pipe_frames_put(tpr_pipe_frames *frames, tpr_pipe_frame *frame) {
    frame->next = NULL;
    *frames->tail = frame;
    frames->tail = &frame->next;
}

static tpr_pipe_frame *tpr_pipe_frames_take(tpr_pipe_frames *frames) {
    tpr_pipe_frame *frame = frames->head;
    frames->head = frame->next;
    if (!frames->head) frames->tail = &frames->head;
    return frame;
}

static inline uint8_t *tpr_pipe_frame_bytes(tpr_pipe_frame *frame) { return (uint8_t *)(frame + 1); }

static tpr_pipe_frame *tpr_pipe_frame_new(tprpc_pipe *pipe, size_t size) {
    size_t block = sizeof(tpr_pipe_frame) + size;
    tpr_pipe_frame *frame = (tpr_pipe_frame *)tpr_base_pool_alloc(&pipe->loop->pool, block);
    if (!frame) return NULL;
    frame->size = (uint32_t)size;
    frame->block = (uint32_t)block;
    frame->sent = frame->cost = frame->handle_count = 0;
    frame->write = NULL;
    return frame;
}

// Ends a frame, sent or not.
static void tpr_pipe_frame_done(tprpc_pipe *pipe, tpr_pipe_frame *frame, tprpc_status status,
                                const tprpc_error *error) {
    tpr_pipe_write *write = frame->write;
    for (uint32_t i = 0; i < frame->handle_count; i++) tpr_os_close((int)frame->handles[i]);
    if (frame->cost) pipe->queued_bytes -= frame->block;
    tpr_base_pool_free(&pipe->loop->pool, frame, frame->block);
    if (write) tpr_pipe_write_done(write, status, error);
}

static inline bool tpr_pipe_has_credit(const tprpc_pipe *pipe, uint32_t cost) {
    uint64_t out = pipe->sent - pipe->granted;   // at most half: the peer holds back less than that before it tells
    return out <= TPR_PIPE_WINDOW / 2 || out + cost <= TPR_PIPE_WINDOW;
}

static inline size_t tpr_pipe_conn_send(tpr_pipe_conn *conn, const tprpc_span *spans, size_t count,
                                        const intptr_t *handles, size_t handle_count, bool more) {
    size_t n = tpr_pipe_table(conn)->send(conn->conn, spans, count, handles, handle_count, more);
    conn->pipe->bytes_sent += n;
    return n;
}

// How many bytes a connection moves in one go, at most.
static inline size_t tpr_pipe_quantum(const tpr_pipe_conn *conn, size_t most) {
    const bool copies = (tpr_pipe_table(conn)->flags & TPRPC_TRANSPORT_LOCAL_COPY) != 0;
    return tpr_loop_chunk(conn->pipe->loop, most, copies ? TPR_LOOP_QUICK_COPY : TPR_LOOP_QUICK_SEND);
}

// Those of the first `count` lanes that are open, a bit each.
static inline uint32_t tpr_pipe_lanes_open(const tprpc_pipe *pipe, uint32_t count) {
    return pipe->lanes_open & ((1u << count) - 1);
}

// Cuts the next chunk for a connection: of the first bulk that may go over it, which is the pipe's own while its lanes
// are not there. lane: its number, 0: the pipe's own. False: there is none.
static bool tpr_pipe_cut_chunk(tpr_pipe_conn *conn, uint32_t lane) {
    tprpc_pipe *pipe = conn->pipe;
    tpr_pipe_bulk *bulk = pipe->bulk;
    while (bulk && (!bulk->size || (lane ? bulk->lanes < lane : tpr_pipe_lanes_open(pipe, bulk->lanes) != 0)))
        bulk = bulk->next;
    if (!bulk || pipe->parting) return false;   // to send to who has closed could cost what still comes from there
    const size_t most = tpr_pipe_quantum(conn, TPR_PIPE_CHUNK);
    const uint32_t size = (uint32_t)(bulk->size < most ? bulk->size : most);
    tpr_wire_put_frame(conn->chunk_header, TPR_WIRE_DATA_HEADER + size, TPR_WIRE_DATA, 0, bulk->channel);
    tpr_base_store_le64(conn->chunk_header + TPR_WIRE_HEADER, bulk->transfer);
    tpr_base_store_le64(conn->chunk_header + TPR_WIRE_HEADER + 8, bulk->offset);
    conn->bulk = bulk;
    conn->data = bulk->data;
    conn->chunk_size = TPR_WIRE_HEADER + TPR_WIRE_DATA_HEADER + size;
    conn->chunk_sent = 0;
    bulk->data += size;
    bulk->offset += size;
    bulk->size -= size;
    bulk->chunks++;
    conn->bulk_sent += size;
    return true;
}

// A connection's chunk was sent, or is given up. Bulk that was taken whole goes back to its channel.
static void tpr_pipe_chunk_over(tpr_pipe_conn *conn) {
    tprpc_pipe *pipe = conn->pipe;
    tpr_pipe_bulk *bulk = conn->bulk, **at = &pipe->bulk;
    tprpc_work *taken = bulk->taken;
    conn->chunk_size = 0;
    conn->bulk = NULL;
    if (--bulk->chunks || bulk->size) return;
    while (*at != bulk) at = &(*at)->next;
    *at = bulk->next;
    if (!*at) pipe->bulk_tail = at;
    tpr_base_pool_free(&pipe->loop->pool, bulk, sizeof *bulk);
    taken->run(taken);
}

// The next piece of the chunk that was cut. Returns whether the connection took all of it.
static bool tpr_pipe_send_chunk(tpr_pipe_conn *conn) {
    const uint32_t header = TPR_WIRE_HEADER + TPR_WIRE_DATA_HEADER;
    tprpc_span spans[2];
    uint32_t head = conn->chunk_sent < header ? header - conn->chunk_sent : 0;
    uint32_t skip = conn->chunk_sent < header ? 0 : conn->chunk_sent - header;
    spans[0].data = conn->chunk_header + header - head;
    spans[0].size = head;
    spans[1].data = (void *)(uintptr_t)(conn->data + skip);
    spans[1].size = conn->chunk_size - header - skip;
    // Whether the next chunk of it goes over this connection, too: what is sent with `more` must be followed by more.
    const bool more = conn->bulk->size > 0 && conn->bulk->lanes == (conn == &conn->pipe->now ? 0u : 1u);
    conn->chunk_sent += (uint32_t)tpr_pipe_conn_send(conn, spans, 2, NULL, 0, more);
    if (conn->chunk_sent < conn->chunk_size) return false;
    tpr_pipe_chunk_over(conn);
    return true;
}

static bool tpr_pipe_send_frame(tprpc_pipe *pipe, tpr_pipe_frame *frame) {
    tprpc_span span;
    span.data = tpr_pipe_frame_bytes(frame) + frame->sent;
    span.size = frame->size - frame->sent;
    size_t n = tpr_pipe_conn_send(&pipe->now, &span, 1, frame->handles, frame->sent ? 0 : frame->handle_count, false);
    frame->sent += (uint32_t)n;
    if (frame->sent < frame->size) return false;
    if (frame->cost) pipe->messages_sent++;
    tpr_pipe_frame_done(pipe, frame, TPRPC_OK, NULL);
    return true;
}

static void tpr_pipe_resume_later(tprpc_pipe *pipe) {
    if (pipe->resume_set) return;
    pipe->resume_set = true;
    pipe->refs++;
    tpr_loop_later(pipe->loop, &pipe->resume);
}

// Sends what the connection takes: what was begun, control, messages that have credit, bulk.
static void tpr_pipe_pump_out(tprpc_pipe *pipe) {
    uint64_t stop = pipe->bytes_sent + (pipe->now.conn ? tpr_pipe_quantum(&pipe->now, TPR_PIPE_ROUND) : 0);
    pipe->refs++;
    while (pipe->state != TPR_PIPE_ENDED && pipe->now.conn) {
        if (pipe->bytes_sent >= stop) {
            tpr_pipe_resume_later(pipe);
            break;
        }
        if (!pipe->current && !pipe->now.chunk_size) {
            if (pipe->urgent.head) {
                pipe->current = tpr_pipe_frames_take(&pipe->urgent);
            } else if (pipe->messages.head && tpr_pipe_has_credit(pipe, pipe->messages.head->cost)) {
                pipe->current = tpr_pipe_frames_take(&pipe->messages);
                pipe->sent += pipe->current->cost;
            }
        }
        if (pipe->current) {
            tpr_pipe_frame *frame = pipe->current;
            pipe->current = NULL;      // sending may end the frame, and what hangs from it may send
            if (tpr_pipe_send_frame(pipe, frame)) continue;
            pipe->current = frame;
            break;
        }
        if (!pipe->now.chunk_size && !tpr_pipe_cut_chunk(&pipe->now, 0)) break;
        if (!tpr_pipe_send_chunk(&pipe->now)) break;
    }
    tpr_pipe_unref(pipe);
}

// The same for a lane, which carries chunks alone.
static void tpr_pipe_lane_pump_out(tpr_pipe_lane *lane) {
    tpr_pipe_conn *conn = &lane->conn;
    tprpc_pipe *pipe = conn->pipe;
    if (lane->state != TPR_PIPE_LANE_OPEN) return;
    uint64_t stop = pipe->bytes_sent + tpr_pipe_quantum(conn, TPR_PIPE_ROUND);
    pipe->refs++;
    while (pipe->state != TPR_PIPE_ENDED && lane->state == TPR_PIPE_LANE_OPEN) {
        if (pipe->bytes_sent >= stop) {
            tpr_pipe_resume_later(pipe);
            break;
        }
        if (!conn->chunk_size && !tpr_pipe_cut_chunk(conn, lane->number)) break;
        if (!tpr_pipe_send_chunk(conn)) break;
    }
    tpr_pipe_unref(pipe);
}

// Sends a control frame, whose body is copied. False: no memory, and the pipe has ended.
static bool tpr_pipe_control(tprpc_pipe *pipe, uint8_t kind, uint16_t channel, const void *body, size_t size,
                             const intptr_t *handles, size_t handle_count) {
    uint8_t small_frame[256];
    if (pipe->state == TPR_PIPE_ENDED || !pipe->now.conn) return false;
    bool idle = !pipe->current && !pipe->now.chunk_size && !pipe->urgent.head && !handle_count;
    if (idle && size + TPR_WIRE_HEADER <= sizeof small_frame) {
        tprpc_span span;
        tpr_wire_put_frame(small_frame, (uint32_t)size, kind, 0, channel);
        tpr_base_copy(small_frame + TPR_WIRE_HEADER, body, size);
        span.data = small_frame;
        span.size = size + TPR_WIRE_HEADER;
        size_t n = tpr_pipe_conn_send(&pipe->now, &span, 1, NULL, 0, false);
        if (n == span.size) return true;
        tpr_pipe_frame *rest = tpr_pipe_frame_new(pipe, span.size - n);
        if (rest) memcpy(tpr_pipe_frame_bytes(rest), small_frame + n, span.size - n);
        if (rest) pipe->current = rest;
        else tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory for a control frame");
        return rest != NULL;
    }
    tpr_pipe_frame *frame = tpr_pipe_frame_new(pipe, size + TPR_WIRE_HEADER);
    if (!frame) {
        tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory for a control frame");
        return false;
    }
    tpr_wire_put_frame(tpr_pipe_frame_bytes(frame), (uint32_t)size, kind, (uint8_t)handle_count, channel);
    tpr_base_copy(tpr_pipe_frame_bytes(frame) + TPR_WIRE_HEADER, body, size);
    for (size_t i = 0; i < handle_count; i++) {
        frame->handles[i] = tpr_os_duplicate((int)handles[i]);
        if (frame->handles[i] >= 0) frame->handle_count++;
    }
    if (frame->handle_count < handle_count) {
        tpr_pipe_frame_done(pipe, frame, TPRPC_OK, NULL);
        tpr_pipe_end(pipe, TPRPC_ERROR_LIMIT, errno, "duplicating a descriptor: %s", strerror(errno));
        return false;
    }
    tpr_pipe_frames_put(&pipe->urgent, frame);
    tpr_pipe_pump_out(pipe);
    return true;
}

// ---- links: what channels send through

static tprpc_status tpr_pipe_link_control(tprpc_link *link, const void *bytes, size_t size, const intptr_t *handles,
                                          size_t handle_count) {
    tpr_pipe_channel *channel = (tpr_pipe_channel *)(void *)link;
    tprpc_pipe *pipe = channel->pipe;
    if (pipe->state == TPR_PIPE_ENDED) return pipe->status;
    tpr_pipe_control(pipe, TPR_WIRE_CHANNEL, channel->index, bytes, size, handles, handle_count);
    return pipe->state == TPR_PIPE_ENDED ? pipe->status : TPRPC_OK;
}

static tprpc_status tpr_pipe_link_bulk(tprpc_link *link, uint64_t transfer, uint64_t offset, const void *data,
                                       size_t size, tprpc_work *taken) {
    tpr_pipe_channel *channel = (tpr_pipe_channel *)(void *)link;
    tprpc_pipe *pipe = channel->pipe;
    if (pipe->state == TPR_PIPE_ENDED) return pipe->status;
    tpr_pipe_bulk *bulk = (tpr_pipe_bulk *)tpr_base_pool_alloc(&pipe->loop->pool, sizeof *bulk);
    if (!bulk) return TPRPC_ERROR_MEMORY;
    bulk->next = NULL;
    bulk->transfer = transfer;
    bulk->offset = offset;
    bulk->data = (const uint8_t *)data;
    bulk->size = size;
    bulk->chunks = 0;
    bulk->lanes = size < TPR_PIPE_LARGE ? 0 : channel->entry->backend->channel->lanes;
    if (bulk->lanes > pipe->ctx->lanes) bulk->lanes = pipe->ctx->lanes;
    bulk->channel = channel->index;
    bulk->taken = taken;
    *pipe->bulk_tail = bulk;
    pipe->bulk_tail = &bulk->next;
    if (bulk->lanes) tpr_pipe_lanes_want(pipe, bulk->lanes);
    tpr_pipe_resume_later(pipe);       // not now: `taken` may not run inside this call
    return TPRPC_OK;
}

static uint32_t tpr_pipe_link_transport(tprpc_link *link) {
    tprpc_pipe *pipe = ((tpr_pipe_channel *)(void *)link)->pipe;
    return pipe->now.entry ? tpr_pipe_table(&pipe->now)->flags : 0;
}

static int32_t tpr_pipe_link_process(tprpc_link *link) {
    tprpc_pipe *pipe = ((tpr_pipe_channel *)(void *)link)->pipe;
    return pipe->now.conn && tpr_pipe_table(&pipe->now)->process ? tpr_pipe_table(&pipe->now)->process(pipe->now.conn)
                                                                 : 0;
}

// ---- transfers

// Payload or tensor i of a message, payloads first.
static inline tprpc_buffer tpr_pipe_item(const tprpc_message *m, size_t i) {
    tprpc_buffer buffer;
    memset(&buffer, 0, sizeof buffer);
    if (i < m->payload_count) {
        buffer.data = m->payloads[i].data;
        buffer.size = m->payloads[i].size;
        buffer.device.kind = TPRPC_CPU;
    } else {
        const tprpc_tensor *tensor = &m->tensors[i - m->payload_count];
        buffer.data = tensor->data;
        buffer.size = tensor->size;
        buffer.device = tpr_pipe_device(tensor->device);
        buffer.stream = tensor->stream;
    }
    return buffer;
}

static void tpr_pipe_in_done(tpr_pipe_in *in, tprpc_status status, const tprpc_error *error) {
    if (status != TPRPC_OK && in->status == TPRPC_OK) {
        in->status = status;
        if (error) in->error = *error;
        else tprpc_error_set(&in->error, status, 0, "the read failed");
    }
    if (--in->pending) return;
    for (size_t i = 0; i < in->message.payload_count + in->message.tensor_count && in->status == TPRPC_OK; i++) {
        const size_t size = tpr_pipe_item(&in->message, i).size;
        in->pipe->tensor_bytes_received += size;
        if (in->slots[i].transfer != TPR_WIRE_INLINE && in->slots[i].bytes) in->pipe->tensor_bytes_adopted += size;
    }
    in->done(in);
}

// The rest of a chunk has nowhere to go when its transfer has ended.
static void tpr_pipe_forget_dest(tpr_pipe_conn *conn, const tpr_pipe_transfer *transfer) {
    if (conn->dest && conn->frame.channel == transfer->channel && conn->data_transfer == transfer->base.base.id)
        conn->dest = NULL;
}

static void tpr_pipe_transfer_ended(tpr_channel_transfer *base, tprpc_status status, const tprpc_error *error) {
    tpr_pipe_transfer *transfer = (tpr_pipe_transfer *)(void *)base;
    tprpc_pipe *pipe = transfer->pipe;
    tprpc_error torn;
    tpr_base_list_remove(&transfer->node);
    if (transfer->in) tpr_pipe_forget_dest(&pipe->now, transfer);
    for (uint32_t i = 0; transfer->in && i < TPR_CONTEXT_LANES; i++)
        if (pipe->lanes[i]) tpr_pipe_forget_dest(&pipe->lanes[i]->conn, transfer);
    if (status != TPRPC_OK && pipe->state == TPR_PIPE_ENDED) {   // what ended the pipe is the cause
        status = pipe->status;
        error = &pipe->error;
    } else if (transfer->torn) {
        status = tprpc_error_set(&torn, TPRPC_ERROR_PEER, 0, "a connection of the pipe was lost: %s", pipe->lane_why);
        error = &torn;
    }
    if (transfer->begun_us && status == TPRPC_OK) tpr_pipe_rate(transfer);
    if (transfer->write) tpr_pipe_write_done(transfer->write, status, error);
    else tpr_pipe_in_done(transfer->in, status, error);
    tpr_pipe_unref(pipe);
}

static void tpr_pipe_transfer_begin(tprpc_pipe *pipe, tpr_pipe_transfer *transfer, uint64_t id, uint16_t channel) {
    transfer->base.base.id = id;
    transfer->base.base.channel_data = NULL;
    transfer->base.base.flags = 0;
    transfer->base.done = tpr_pipe_transfer_ended;
    transfer->base.loop = pipe->loop->index;
    transfer->pipe = pipe;
    transfer->channel = channel;
    tpr_base_list_add(&pipe->transfers, &transfer->node);
    pipe->refs++;
}

// Undoes a begin whose channel refused.
static void tpr_pipe_transfer_refused(tpr_pipe_transfer *transfer) {
    transfer->base.done = NULL;
    tpr_base_list_remove(&transfer->node);
    transfer->pipe->refs--;            // the caller holds another
}

TPR_COLD static void tpr_pipe_abort(tpr_pipe_transfer *transfer, bool link_lost) {
    tpr_pipe_channel *channel = transfer->pipe->channels[transfer->channel];
    channel->entry->backend->channel->abort(channel->end, &transfer->base.base, link_lost);
}

// Whether the channel can move buffers of these sizes at these addresses.
static bool tpr_pipe_fits(const tprpc_channel_table *table, const tprpc_buffer *buffers, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (table->max_bytes && buffers[i].size > table->max_bytes) return false;
        if (table->alignment > 1 &&
            ((uintptr_t)buffers[i].data % table->alignment || buffers[i].size % table->alignment)) return false;
    }
    return true;
}

// The best channel that is proven in the direction, moves between the devices and can take the buffers, below `after`
// in order; NULL: none.
static tpr_pipe_channel *tpr_pipe_pick(tprpc_pipe *pipe, tprpc_device from, tprpc_device to,
                                       const tprpc_buffer *buffers, size_t count, const tpr_pipe_channel *after) {
    tpr_pipe_channel *best = NULL;
    for (uint32_t i = 0; i < pipe->channel_count; i++) {
        tpr_pipe_channel *channel = pipe->channels[i];
        if (!channel->end) continue;   // one that only the peer has, or that could not be set up
        const tprpc_channel_table *table = channel->entry->backend->channel;
        void *instance = channel->entry->instances[pipe->loop->index];
        bool usable = channel->proved && (channel->verdict || !(table->flags & TPRPC_CHANNEL_MUTUAL));
        if (!usable || !table->moves(instance, from, to) || !tpr_pipe_fits(table, buffers, count)) continue;
        if (after && channel->entry->priority >= after->entry->priority) continue;
        if (!best || channel->entry->priority > best->entry->priority) best = channel;
    }
    return best;
}

// The channel for a batch of `size` bytes: the best, or of those that are rated (and which the user has not put into an
// order) the one that was fastest, after each has been tried. trial: it is going to be sent.
static tpr_pipe_channel *tpr_pipe_choose(tprpc_pipe *pipe, tprpc_device from, tprpc_device to,
                                         const tprpc_buffer *buffers, size_t count, size_t size, bool trial) {
    tpr_pipe_channel *best = tpr_pipe_pick(pipe, from, to, buffers, count, NULL), *fast = best, *least = best;
    if (!best || pipe->ctx->ordered_channels || !(best->entry->backend->channel->flags & TPRPC_CHANNEL_RATED))
        return best;
    for (tpr_pipe_channel *other = best; (other = tpr_pipe_pick(pipe, from, to, buffers, count, other)) != NULL;) {
        if (!(other->entry->backend->channel->flags & TPRPC_CHANNEL_RATED)) continue;
        if (other->rate > fast->rate && fast->rate) fast = other;
        if (other->tries < least->tries) least = other;
    }
    if (!trial || size < TPR_PIPE_RATED) return fast;
    const bool again = ++pipe->rated % TPR_PIPE_RATED_AGAIN == 0;
    if (least->tries < TPR_PIPE_RATED_TRIES || again) fast = least;
    fast->tries++;
    return fast;
}

// A rated batch was sent: those of a pipe are moved one after the other.
static void tpr_pipe_rate(tpr_pipe_transfer *transfer) {
    tprpc_pipe *pipe = transfer->pipe;
    tpr_pipe_channel *channel = pipe->channels[transfer->channel];
    const int64_t now = tpr_loop_clock(pipe->loop);
    const int64_t from = transfer->begun_us > pipe->rated_us ? transfer->begun_us : pipe->rated_us;
    const uint64_t rate = transfer->bytes / (uint64_t)(now > from ? now - from : 1);
    const uint32_t faded = channel->rate - channel->rate / 8;
    pipe->rated_us = now;
    channel->rate = rate > faded ? (uint32_t)(rate < UINT32_MAX ? rate : UINT32_MAX) : faded;
}

// ---- writing a message

typedef struct tpr_pipe_plan {         // how the items of one message travel
    const tprpc_message *message;
    size_t   count;                    // payloads, then tensors
    uint8_t *where;                    // per item: an index into transfers, or TPR_WIRE_INLINE
    uint32_t transfer_count;
    tpr_wire_transfer transfers[TPR_WIRE_CHANNELS];
    uint8_t *descriptors[TPR_WIRE_CHANNELS];
    uint8_t  few[64];                  // `where` of a message with few items
} tpr_pipe_plan;

static inline tprpc_device tpr_pipe_item_target(const tprpc_message *m, size_t i) {
    tprpc_device target = tpr_pipe_item(m, i).device;
    if (i >= m->payload_count && m->tensors[i - m->payload_count].target.kind != TPRPC_DEVICE_DEFAULT)
        target = m->tensors[i - m->payload_count].target;
    return target;
}

// Whether the message is a few bytes and nothing else, and the pipe has nothing to send before it.
static inline bool tpr_pipe_takes_short(const tprpc_pipe *pipe, const tprpc_message *m) {
    return !m->payload_count && !m->tensor_count && m->metadata_size <= TPR_PIPE_SHORT &&
           pipe->state == TPR_PIPE_OPEN && !pipe->queued_bytes;
}

// Whether the message can leave as one frame, with all its bytes.
static inline bool tpr_pipe_is_inline(const tprpc_pipe *pipe, const tprpc_message *m) {
    size_t total = 0;
    if (m->payload_count + m->tensor_count > 64) return false;
    for (size_t i = 0; i < m->payload_count + m->tensor_count; i++) {
        tprpc_buffer buffer = tpr_pipe_item(m, i);
        total += buffer.size;
        if (buffer.size > pipe->inline_bytes || total > TPR_PIPE_INLINE_ALL) return false;
        if (buffer.size && (buffer.device.kind != TPRPC_CPU || tpr_pipe_item_target(m, i).kind != TPRPC_CPU))
            return false;
    }
    return true;
}

static tprpc_status tpr_pipe_check_tensor(const tprpc_tensor *t, size_t i, tprpc_error *error) {
    int64_t expected = 1;
    bool strided = false, dense = true;
    if (t->size && !t->data)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tensor %zu: data is NULL, size is not", i);
    if (t->metadata_size && !t->metadata)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tensor %zu: metadata is NULL, its size is not", i);
    if (t->ndim < 0 || t->ndim > TPRPC_MAX_DIMS)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tensor %zu: ndim is %d, not 0 to %d", i, (int)t->ndim,
                               TPRPC_MAX_DIMS);
    if (!tpr_wire_shape_fits(t->dtype, t->ndim, t->shape, t->size))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "tensor %zu: shape times dtype is not its size of %zu bytes", i, t->size);
    for (int32_t d = t->ndim; d-- > 0;) {
        strided |= t->strides[d] != 0;
        dense &= t->shape[d] <= 1 || t->strides[d] == expected;
        expected *= t->shape[d] ? t->shape[d] : 1;
    }
    if (strided && !dense && t->size)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                               "tensor %zu is strided: make it contiguous before it is sent", i);
    return TPRPC_OK;
}

// Whether a message can be one at all, and within which limits; the pipe is as before when it cannot.
static tprpc_status tpr_pipe_check(const tprpc_message *m, uint64_t message_bytes, uint64_t metadata_bytes,
                                   uint32_t tensors, tprpc_error *error) {
    uint64_t bytes = 0, metadata = m->metadata_size;
    if ((m->metadata_size && !m->metadata) || (m->tensor_count && !m->tensors) || (m->payload_count && !m->payloads))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the message has a NULL array or metadata with a size");
    if (m->tensor_count > tensors || m->payload_count > tensors || m->tensor_count + m->payload_count > tensors)
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "the message has %zu tensors and payloads, the limit is %u",
                               m->tensor_count + m->payload_count, (unsigned)tensors);
    for (size_t i = 0; i < m->tensor_count; i++) {
        tprpc_status status = tpr_pipe_check_tensor(&m->tensors[i], i, error);
        if (status != TPRPC_OK) return status;
        bytes = bytes + m->tensors[i].size < bytes ? UINT64_MAX : bytes + m->tensors[i].size;
        metadata += m->tensors[i].metadata_size;
    }
    for (size_t i = 0; i < m->payload_count; i++) {
        const tprpc_payload *p = &m->payloads[i];
        if ((p->size && !p->data) || (p->metadata_size && !p->metadata))
            return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "payload %zu: a pointer is NULL, its size is not", i);
        bytes = bytes + p->size < bytes ? UINT64_MAX : bytes + p->size;
        metadata += p->metadata_size;
    }
    if (m->flags & ~(uint32_t)TPRPC_MESSAGE_GIVE)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the message has unknown flags: 0x%x",
                               (unsigned)m->flags);
    if (bytes > message_bytes)
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0,
                               "the message has %llu bytes, the limit of the two ends is %llu",
                               (unsigned long long)bytes, (unsigned long long)message_bytes);
    if (metadata > metadata_bytes)
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "the message has %llu bytes of metadata, the limit is %llu",
                               (unsigned long long)metadata, (unsigned long long)metadata_bytes);
    return TPRPC_OK;
}

static bool tpr_pipe_same_device(tprpc_device a, tprpc_device b) { return a.kind == b.kind && a.index == b.index; }

// Decides how each item travels. False: no channel moves one of them; the error says which.
static bool tpr_pipe_plan_items(tprpc_pipe *pipe, tpr_pipe_plan *plan, tprpc_error *error) {
    size_t total = 0;
    tpr_pipe_channel *channel = NULL;
    tprpc_device last_from = TPR_ZERO, last_to = TPR_ZERO;
    for (size_t i = 0; i < plan->count; i++) {
        tprpc_buffer buffer = tpr_pipe_item(plan->message, i);
        tprpc_device to = tpr_pipe_item_target(plan->message, i);
        bool host = buffer.device.kind == TPRPC_CPU && to.kind == TPRPC_CPU;
        plan->where[i] = TPR_WIRE_INLINE;
        if (!buffer.size ||
            (host && buffer.size <= pipe->inline_bytes && total + buffer.size <= TPR_PIPE_INLINE_ALL)) {
            total += buffer.size;
            continue;
        }
        if (host || !channel || !tpr_pipe_same_device(buffer.device, last_from) || !tpr_pipe_same_device(to, last_to) ||
            !tpr_pipe_fits(channel->entry->backend->channel, &buffer, 1))   // else as the one before
            channel = tpr_pipe_choose(pipe, buffer.device, to, &buffer, 1, buffer.size, true);
        last_from = buffer.device;
        last_to = to;
        uint32_t k = 0;
        while (channel && k < plan->transfer_count && plan->transfers[k].channel != channel->index) k++;
        if (!channel || k == TPR_WIRE_CHANNELS) {
            tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                            "no channel to this peer moves %zu bytes from device kind %d to %d", buffer.size,
                            (int)buffer.device.kind, (int)to.kind);
            return false;
        }
        if (k == plan->transfer_count) plan->transfers[plan->transfer_count++].channel = channel->index;
        plan->where[i] = (uint8_t)k;
    }
    return true;
}

// Begins one transfer on the channel planned, or on the next that takes it.
static tprpc_status tpr_pipe_plan_send(tprpc_pipe *pipe, tpr_pipe_plan *plan, uint32_t k, tpr_pipe_write *write,
                                       tprpc_buffer *buffers, tprpc_error *error) {
    tpr_pipe_channel *channel = pipe->channels[plan->transfers[k].channel];
    tpr_pipe_transfer *transfer = &write->transfers[k];
    tprpc_device from = TPR_ZERO, to = TPR_ZERO;
    size_t count = 0;
    uint64_t bytes = 0;
    for (size_t i = 0; i < plan->count; i++) {
        if (plan->where[i] != k) continue;
        buffers[count++] = tpr_pipe_item(plan->message, i);
        bytes += buffers[count - 1].size;
        from = buffers[0].device;
        to = tpr_pipe_item_target(plan->message, i);
    }
    for (; channel; channel = tpr_pipe_pick(pipe, from, to, buffers, count, channel)) {
        const tprpc_channel_table *table = channel->entry->backend->channel;
        size_t size = table->max_descriptor;
        plan->descriptors[k] = size ? (uint8_t *)tpr_base_pool_alloc(&pipe->loop->pool, size) : NULL;
        if (size && !plan->descriptors[k])
            return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a transfer's descriptor");
        memset(transfer, 0, sizeof *transfer);
        transfer->write = write;
        transfer->bytes = bytes;
        if (bytes >= TPR_PIPE_RATED && (table->flags & TPRPC_CHANNEL_RATED))
            transfer->begun_us = tpr_loop_clock(pipe->loop);
        write->pending++;
        tpr_pipe_transfer_begin(pipe, transfer, pipe->next_transfer++, channel->index);
        if (plan->message->release && (plan->message->flags & TPRPC_MESSAGE_GIVE))
            transfer->base.base.flags = TPRPC_TRANSFER_GIVEN;
        plan->transfers[k].id = transfer->base.base.id;
        plan->transfers[k].channel = channel->index;
        tprpc_status status =
            table->send(channel->end, &transfer->base.base, buffers, count, plan->descriptors[k], &size, error);
        plan->transfers[k].descriptor.data = plan->descriptors[k];
        plan->transfers[k].descriptor.size = size;
        if (status == TPRPC_OK) return TPRPC_OK;
        tpr_pipe_transfer_refused(transfer);
        write->pending--;
        tpr_base_pool_free(&pipe->loop->pool, plan->descriptors[k], table->max_descriptor);
        plan->descriptors[k] = NULL;
        pipe->fallbacks++;
        TPR_LOG(&pipe->ctx->env.logger, TPRPC_LOG_INFO, "pipe", "", "%s refused a transfer, the next channel is tried",
                channel->entry->backend->name);
    }
    return error->status != TPRPC_OK ? error->status
           : tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "no channel took the transfer");
}

static size_t tpr_pipe_message_size(const tpr_pipe_plan *plan, size_t prefix_size) {
    const tprpc_message *m = plan->message;
    size_t size = TPR_WIRE_HEADER + TPR_WIRE_MESSAGE_HEADER + prefix_size + m->metadata_size;
    for (uint32_t k = 0; k < plan->transfer_count; k++)
        size += TPR_WIRE_TRANSFER_BYTES + plan->transfers[k].descriptor.size;
    for (size_t i = 0; i < m->payload_count; i++) size += TPR_WIRE_PAYLOAD_BYTES + m->payloads[i].metadata_size;
    for (size_t i = 0; i < m->tensor_count; i++)
        size += tpr_wire_tensor_bytes(m->tensors[i].ndim) + m->tensors[i].metadata_size;
    for (size_t i = 0; i < plan->count; i++)
        if (plan->where[i] == TPR_WIRE_INLINE) size += tpr_pipe_item(m, i).size;
    return size;
}

static void tpr_pipe_build_message(const tpr_pipe_plan *plan, const void *prefix, size_t prefix_size, uint8_t *out,
                                   size_t size) {
    const tprpc_message *m = plan->message;
    tpr_wire_writer w = tpr_wire_writer_of(out + TPR_WIRE_HEADER, size - TPR_WIRE_HEADER);
    tpr_wire_message head;
    tpr_wire_put_frame(out, (uint32_t)(size - TPR_WIRE_HEADER), TPR_WIRE_MESSAGE, 0, 0);
    head.metadata_size = (uint32_t)m->metadata_size;
    head.payloads = (uint16_t)m->payload_count;
    head.tensors = (uint16_t)m->tensor_count;
    head.transfers = (uint8_t)plan->transfer_count;
    head.prefix_size = (uint8_t)prefix_size;
    tpr_wire_write_message(&w, &head);
    for (size_t i = 0; i < plan->count; i++) {
        tpr_wire_item item;
        bool payload = i < m->payload_count;
        const tprpc_tensor *t = payload ? NULL : &m->tensors[i - m->payload_count];
        item.size = tpr_pipe_item(m, i).size;
        item.metadata_size = (uint32_t)(payload ? m->payloads[i].metadata_size : t->metadata_size);
        item.transfer = plan->where[i];
        if (payload) {
            tpr_wire_write_payload(&w, &item);
            continue;
        }
        item.dtype = (uint8_t)t->dtype;
        item.ndim = (uint8_t)t->ndim;
        item.device = tpr_pipe_device(t->device);
        item.target = t->target;
        memcpy(item.shape, t->shape, sizeof item.shape);
        tpr_wire_write_tensor(&w, &item);
    }
    for (uint32_t k = 0; k < plan->transfer_count; k++) tpr_wire_write_transfer(&w, &plan->transfers[k]);
    tpr_wire_write_raw(&w, prefix, prefix_size);
    tpr_wire_write_raw(&w, m->metadata, m->metadata_size);
    for (size_t i = 0; i < m->payload_count; i++)
        tpr_wire_write_raw(&w, m->payloads[i].metadata, m->payloads[i].metadata_size);
    for (size_t i = 0; i < m->tensor_count; i++)
        tpr_wire_write_raw(&w, m->tensors[i].metadata, m->tensors[i].metadata_size);
    for (size_t i = 0; i < plan->count; i++) {
        tprpc_buffer buffer = tpr_pipe_item(m, i);
        if (plan->where[i] == TPR_WIRE_INLINE) tpr_wire_write_raw(&w, buffer.data, buffer.size);
    }
    TPRPC_ASSERT(!w.failed && w.at == w.end);
}

// Whether nothing waits to leave that a message would have to go behind.
static inline bool tpr_pipe_way_is_free(const tprpc_pipe *pipe) {
    return !pipe->current && !pipe->now.chunk_size && !pipe->urgent.head && !pipe->messages.head;
}

// Keeps a message's frame that did not leave whole: as the one that is being sent, or behind others.
static void tpr_pipe_keep_frame(tprpc_pipe *pipe, tpr_pipe_frame *frame, size_t sent, bool now, tpr_pipe_write *write) {
    bool idle = tpr_pipe_way_is_free(pipe);
    frame->sent = (uint32_t)sent;
    frame->cost = frame->size;
    frame->write = write;
    if (write) write->pending++;
    pipe->queued_bytes += frame->block;
    if (now) pipe->current = frame;
    else tpr_pipe_frames_put(&pipe->messages, frame);
    if (!now && !idle) tpr_pipe_pump_out(pipe);
}

// Sends a built message's frame, or queues it behind others or for credit. False: no memory to queue it.
static bool tpr_pipe_emit(tprpc_pipe *pipe, const uint8_t *bytes, tpr_pipe_frame *frame, size_t size,
                          tpr_pipe_write *write) {
    size_t sent = 0;
    bool now = tpr_pipe_way_is_free(pipe) && tpr_pipe_has_credit(pipe, (uint32_t)size);
    if (now) {
        tprpc_span span;
        span.data = frame ? tpr_pipe_frame_bytes(frame) : (uint8_t *)(uintptr_t)bytes;
        span.size = size;
        sent = tpr_pipe_conn_send(&pipe->now, &span, 1, NULL, 0, false);
        pipe->sent += size;
        if (TPR_LIKELY(sent == size)) {
            pipe->messages_sent++;
            if (frame) tpr_base_pool_free(&pipe->loop->pool, frame, frame->block);
            return true;
        }
    }
    if (!frame) {
        frame = tpr_pipe_frame_new(pipe, size);
        if (!frame && sent) tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory for the rest of a frame");
        if (!frame) return false;
        memcpy(tpr_pipe_frame_bytes(frame), bytes, size);
    }
    tpr_pipe_keep_frame(pipe, frame, sent, now, write);
    return true;
}

// The general path of a message on an open pipe. `write` may be NULL for one that is inline. Errors before anything
// began are returned; later ones end the write.
static tprpc_status tpr_pipe_send_planned(tprpc_pipe *pipe, tpr_pipe_write *write, const void *prefix,
                                          size_t prefix_size, const tprpc_message *message, tprpc_error *error) {
    uint8_t stack[TPR_PIPE_STACK];
    tpr_pipe_plan plan;
    tpr_pipe_frame *frame = NULL;
    tprpc_buffer *buffers = NULL;
    tprpc_status status = TPRPC_OK;
    plan.message = message;
    plan.count = message->payload_count + message->tensor_count;
    plan.transfer_count = 0;
    plan.where =
        plan.count <= sizeof plan.few ? plan.few : (uint8_t *)tpr_base_pool_alloc(&pipe->loop->pool, plan.count);
    if (!plan.where) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a message's plan");
    if (!tpr_pipe_plan_items(pipe, &plan, error)) status = error->status;
    if (status == TPRPC_OK && plan.transfer_count) {
        buffers = (tprpc_buffer *)tpr_base_pool_alloc(&pipe->loop->pool, plan.count * sizeof *buffers);
        if (!buffers) status = tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a message's plan");
        for (uint32_t k = 0; k < plan.transfer_count && status == TPRPC_OK; k++) {
            plan.descriptors[k] = NULL;
            status = tpr_pipe_plan_send(pipe, &plan, k, write, buffers, error);
            if (status == TPRPC_OK) write->transfer_count++;
        }
    }
    size_t size = tpr_pipe_message_size(&plan, prefix_size);
    if (status == TPRPC_OK && size > sizeof stack) frame = tpr_pipe_frame_new(pipe, size);
    if (status == TPRPC_OK && size > UINT32_MAX / 2)
        status = tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "the message is too long");
    if (status == TPRPC_OK && size > sizeof stack && !frame)
        status = tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a frame of %zu bytes", size);
    if (status == TPRPC_OK && pipe->state == TPR_PIPE_ENDED) {   // a channel found it broken
        *error = pipe->error;
        status = pipe->status;
        if (frame) tpr_base_pool_free(&pipe->loop->pool, frame, frame->block);
    }
    if (status == TPRPC_OK) {
        uint8_t *out = frame ? tpr_pipe_frame_bytes(frame) : stack;
        tpr_pipe_build_message(&plan, prefix, prefix_size, out, size);
        for (size_t i = 0; i < plan.count; i++) pipe->tensor_bytes_sent += tpr_pipe_item(message, i).size;
        if (!tpr_pipe_emit(pipe, stack, frame, size, write))
            status = tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory to queue a message");
    }
    for (uint32_t k = 0; k < plan.transfer_count; k++) {
        if (buffers && plan.descriptors[k])
            tpr_base_pool_free(&pipe->loop->pool, plan.descriptors[k],
                               pipe->channels[plan.transfers[k].channel]->entry->backend->channel->max_descriptor);
    }
    if (buffers) tpr_base_pool_free(&pipe->loop->pool, buffers, plan.count * sizeof *buffers);
    if (plan.where != plan.few) tpr_base_pool_free(&pipe->loop->pool, plan.where, plan.count);
    return status;
}

// The short path: a message of a few bytes and nothing else, on an open pipe, is one frame built in one go.
static tprpc_status tpr_pipe_send_short(tprpc_pipe *pipe, const void *prefix, size_t prefix_size,
                                        const tprpc_message *message, tprpc_error *error) {
    uint8_t head[(size_t)TPR_WIRE_SHORT + TPR_WIRE_PREFIX];
    size_t head_size = TPR_WIRE_SHORT + prefix_size, size = head_size + message->metadata_size, sent = 0;
    tprpc_span spans[2];
    bool now = tpr_pipe_way_is_free(pipe) && tpr_pipe_has_credit(pipe, (uint32_t)size);
    tpr_wire_put_short(head, (uint32_t)message->metadata_size, (uint8_t)prefix_size);
    tpr_base_copy_few(head + TPR_WIRE_SHORT, (const uint8_t *)prefix, prefix_size);
    pipe->fast_messages++;
    tpr_loop_saw_small(pipe->loop);
    if (TPR_LIKELY(now)) {
        spans[0].data = head;
        spans[0].size = head_size;
        spans[1].data = (void *)(uintptr_t)message->metadata;
        spans[1].size = message->metadata_size;
        pipe->sent += size;
        sent = tpr_pipe_conn_send(&pipe->now, spans, message->metadata_size ? 2 : 1, NULL, 0, false);
        if (TPR_LIKELY(sent == size)) {
            pipe->messages_sent++;
            return TPRPC_OK;
        }
    }
    tpr_pipe_frame *frame = tpr_pipe_frame_new(pipe, size);
    if (!frame) {
        if (sent) tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory for the rest of a frame");
        else if (now) pipe->sent -= size;
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory to queue a message");
    }
    memcpy(tpr_pipe_frame_bytes(frame), head, head_size);
    tpr_base_copy(tpr_pipe_frame_bytes(frame) + head_size, message->metadata, message->metadata_size);
    tpr_pipe_keep_frame(pipe, frame, sent, now, NULL);
    return TPRPC_OK;
}

// Whether what is lent of that kind is to be seen by its converter; where not, its channel knows what to do.
static bool tpr_pipe_prepares(const tprpc_context *ctx, int32_t kind) {
    const tpr_context_backend *entry = tpr_pipe_converter(ctx, kind);
    return entry && entry->backend->converter->prepare;
}

// How many tensors of a message a converter has a hand in, or must have.
static uint32_t tpr_pipe_device_tensors(const tprpc_pipe *pipe, const tprpc_message *message) {
    uint32_t count = 0;
    for (size_t i = 0; i < message->tensor_count; i++) {
        const tprpc_tensor *tensor = &message->tensors[i];
        if (tpr_pipe_on_host(tensor) || !tensor->size) continue;
        if (!message->release || tpr_pipe_prepares(pipe->ctx, tensor->device.kind)) count++;
    }
    return count;
}

// Has converters prepare a write's tensors on devices, and copy those that were not lent. `message` is the write's own.
static tprpc_status tpr_pipe_keep_devices(tpr_pipe_write *write, const tprpc_message *message, uint32_t count,
                                          bool lent, tprpc_error *error) {
    tprpc_pipe *pipe = write->pipe;
    tpr_pipe_keep *keeps = (tpr_pipe_keep *)tpr_base_pool_alloc(&pipe->loop->pool, count * sizeof *keeps);
    if (!keeps) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory to keep %u tensors", (unsigned)count);
    memset(keeps, 0, count * sizeof *keeps);
    write->keeps = keeps;
    write->keep_count = count;
    uint32_t used = 0;
    tprpc_status status = TPRPC_OK;
    for (size_t i = 0; i < message->tensor_count && used < count && status == TPRPC_OK; i++) {
        tprpc_tensor *tensor = (tprpc_tensor *)(uintptr_t)&message->tensors[i];
        tpr_pipe_keep *keep = &keeps[used];
        if (tpr_pipe_on_host(tensor) || !tensor->size) continue;
        keep->entry = tpr_pipe_converter(pipe->ctx, tensor->device.kind);
        const tprpc_converter_table *table = keep->entry ? keep->entry->backend->converter : NULL;
        if (lent && (!table || !table->prepare)) continue;
        if (!table || (!lent && !table->copy)) {
            status = tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                                     "tensor %zu is on device kind %d, which nothing "
                                     "copies here: lend it (release)",
                                     i, (int)tensor->device.kind);
            break;
        }
        used++;
        keep->device = tensor->device;
        keep->size = tensor->size;
        if (!lent) status = table->copy(keep->entry->backend->user, pipe->ctx, tensor, &keep->copy, error);
        if (!lent && status == TPRPC_OK) tensor->data = keep->copy;
        if (status == TPRPC_OK && table->prepare)
            status = table->prepare(keep->entry->backend->user, pipe->ctx, tensor, &keep->keep, error);
        keep->stream = tensor->stream;
        keep->prepared = status == TPRPC_OK && table->prepare && table->sent;
    }
    return status;
}

// Sends a message, parks it until the pipe is open, or fails. `write` was begun; it is ended through its callback
// when this returns OK, and is the caller's to undo when it does not. lent: the bytes stay until the write ends.
static tprpc_status tpr_pipe_send(tprpc_pipe *pipe, tpr_pipe_write *write, const void *prefix, size_t prefix_size,
                                  const tprpc_message *message, bool lent, tprpc_error *error) {
    tprpc_error mine;
    if (!error) error = &mine;
    error->status = TPRPC_OK;
    if (!write && tpr_pipe_takes_short(pipe, message))
        return tpr_pipe_send_short(pipe, prefix, prefix_size, message, error);
    if (pipe->state == TPR_PIPE_ENDED) {
        *error = pipe->error;
        return pipe->status;
    }
    bool parked = pipe->state != TPR_PIPE_OPEN;
    bool whole = tpr_pipe_is_inline(pipe, message);
    uint32_t devices = whole ? 0 : tpr_pipe_device_tensors(pipe, message);
    if (parked || devices || (!whole && !lent)) {
        message = tpr_pipe_write_copy(write, message, !lent, error);
        if (!message) return error->status;
        tprpc_status kept = devices ? tpr_pipe_keep_devices(write, message, devices, lent, error) : TPRPC_OK;
        if (kept != TPRPC_OK) return kept;
    } else if (TPR_UNLIKELY(pipe->queued_bytes && pipe->queued_bytes + tpr_pipe_copy_size(message, !lent || whole) >
                            pipe->ctx->limits.inflight_bytes)) {   // what cannot leave at once is queued, frame and all
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "the pipe holds %llu bytes on their way and may hold %llu",
                               (unsigned long long)pipe->queued_bytes,
                               (unsigned long long)pipe->ctx->limits.inflight_bytes);
    }
    if (parked) {
        tpr_base_copy(write->prefix, prefix, prefix_size);
        write->prefix_size = (uint8_t)prefix_size;
        write->parked = message;
        return TPRPC_OK;
    }
    tprpc_status status = tpr_pipe_send_planned(pipe, write, prefix, prefix_size, message, error);
    if (!write || (status != TPRPC_OK && !write->transfer_count && pipe->state != TPR_PIPE_ENDED))
        return status;                 // nothing has begun; where the pipe ended of it, the write ends like all others
    for (uint32_t k = 0; k < write->transfer_count && status != TPRPC_OK; k++)
        if (write->transfers[k].base.done) tpr_pipe_abort(&write->transfers[k], false);
    tpr_pipe_write_done(write, status, error);
    return TPRPC_OK;
}

// Undoes a begun write that nothing hangs from.
TPR_COLD static void tpr_pipe_write_undo(tpr_pipe_write *write) {
    tprpc_pipe *pipe = write->pipe;
    tpr_base_list_remove(&write->node);
    tpr_pipe_write_let_go(write);
    tpr_pipe_unref(pipe);
}

// Sends what was parked while the pipe was not open, in order.
static void tpr_pipe_unpark(tprpc_pipe *pipe) {
    for (tpr_base_list *node = pipe->writes.next, *next; node != &pipe->writes; node = next) {
        tpr_pipe_write *write = TPR_CONTAINER(node, tpr_pipe_write, node);
        const tprpc_message *message = write->parked;
        tprpc_error error = TPR_ZERO;
        next = node->next;
        if (!message) continue;
        write->parked = NULL;
        tprpc_status status = tpr_pipe_check(message, pipe->message_bytes, pipe->metadata_bytes, pipe->tensors, &error);
        if (status == TPRPC_OK)
            status = tpr_pipe_send_planned(pipe, write, write->prefix, write->prefix_size, message, &error);
        for (uint32_t k = 0; k < write->transfer_count && status != TPRPC_OK; k++)
            if (write->transfers[k].base.done) tpr_pipe_abort(&write->transfers[k], false);
        tpr_pipe_write_done(write, status, &error);
        if (pipe->state != TPR_PIPE_OPEN) return;   // what is left ends with the pipe
    }
}

// ---- incoming messages

// Frees a message and what was allocated for it, and lets the senders have theirs. Its transfers have ended.
static void tpr_pipe_in_free(tpr_pipe_in *in) {
    tpr_loop *loop = in->loop;
    tprpc_context *ctx = loop->context;
    for (uint32_t k = 0; k < in->transfer_count; k++) {
        const tpr_pipe_transfer *transfer = &in->transfers[k];
        if (!transfer->hold) continue;
        transfer->holder->backend->channel->let_go(transfer->holder->instances[loop->index], transfer->hold);
    }
    size_t count = in->message.payload_count + in->message.tensor_count;
    for (size_t i = 0; i < count; i++) {
        tpr_pipe_slot *slot = &in->slots[i];
        if (!slot->owned) continue;
        if (slot->converter) {
            const tprpc_backend *backend = slot->converter->backend;
            backend->converter->release(backend->user, ctx, slot->device, slot->owned, slot->owned_size, slot->stream);
        } else {
            tpr_base_pool_free(&loop->pool, slot->owned, slot->owned_size);
        }
    }
    tpr_base_pool_give(&loop->pool, in, in->block);
}

// Gives credit back for what was taken off the pipe's hands.
static inline void tpr_pipe_consumed(tprpc_pipe *pipe, uint32_t cost) {
    uint8_t body[8];
    pipe->consumed += cost;
    if (pipe->consumed - pipe->told < TPR_PIPE_WINDOW / 4 || pipe->state != TPR_PIPE_OPEN) return;
    pipe->told = pipe->consumed;
    tpr_base_store_le64(body, pipe->consumed);
    tpr_pipe_control(pipe, TPR_WIRE_CREDIT, 0, body, sizeof body, NULL, 0);
}

// Where the parts of a message's block lie.
static tpr_pipe_in *tpr_pipe_in_new(tprpc_pipe *pipe, const tpr_wire_message *head, size_t body_size) {
    size_t items = (size_t)head->payloads + head->tensors;
    size_t size = tpr_pipe_round_up(sizeof(tpr_pipe_in)) + tpr_pipe_round_up(head->tensors * sizeof(tprpc_tensor)) +
                  tpr_pipe_round_up(head->payloads * sizeof(tprpc_payload)) +
                  tpr_pipe_round_up(items * sizeof(tpr_pipe_slot)) +
                  tpr_pipe_round_up(head->transfers * sizeof(tpr_pipe_transfer)) +
                  tpr_pipe_round_up(head->transfers * sizeof(tpr_wire_transfer)) + body_size +
                  64 * (2 * items + head->transfers + 2u);
    uint8_t *at = (uint8_t *)tpr_base_pool_alloc(&pipe->loop->pool, size);
    tpr_pipe_in *in = (tpr_pipe_in *)(void *)at;
    if (!in) return NULL;
    memset(in, 0, offsetof(tpr_pipe_in, error));
    in->done = NULL;
    in->user = NULL;
    in->block = (uint32_t)size;
    in->pipe = pipe;
    in->loop = pipe->loop;
    at += tpr_pipe_round_up(sizeof(tpr_pipe_in));
    in->tensors = (tprpc_tensor *)(void *)at;
    at += tpr_pipe_round_up(head->tensors * sizeof(tprpc_tensor));
    in->payloads = (tprpc_payload *)(void *)at;
    at += tpr_pipe_round_up(head->payloads * sizeof(tprpc_payload));
    in->slots = (tpr_pipe_slot *)(void *)at;
    at += tpr_pipe_round_up(items * sizeof(tpr_pipe_slot));
    in->transfers = (tpr_pipe_transfer *)(void *)at;
    if (head->transfers) memset(in->transfers, 0, head->transfers * sizeof *in->transfers);   // for an early abort
    at += tpr_pipe_round_up(head->transfers * sizeof(tpr_pipe_transfer));
    in->wire = (tpr_wire_transfer *)(void *)at;
    at += tpr_pipe_round_up(head->transfers * sizeof(tpr_wire_transfer));
    in->message.metadata = at;         // what follows is bytes
    in->message.metadata_size = head->metadata_size;
    in->message.tensors = in->tensors;
    in->message.tensor_count = head->tensors;
    in->message.payloads = in->payloads;
    in->message.payload_count = head->payloads;
    in->transfer_count = head->transfers;
    tpr_base_list_init(&in->node);
    return in;
}

// A block for a short message, which all have one size.
static inline tpr_pipe_in *tpr_pipe_in_short(tprpc_pipe *pipe, uint32_t metadata_size, uint8_t prefix_size) {
    const size_t head = tpr_pipe_round_up(sizeof(tpr_pipe_in)), size = head + TPR_PIPE_SHORT;
    tpr_pipe_in *in = (tpr_pipe_in *)tpr_base_pool_take(&pipe->loop->pool, size);
    if (TPR_UNLIKELY(!in)) return NULL;
    tpr_base_list_init(&in->node);
    in->pipe = pipe;
    in->loop = pipe->loop;
    in->message.metadata = (uint8_t *)in + head;
    in->message.metadata_size = metadata_size;
    in->message.tensors = in->tensors = NULL;
    in->message.payloads = in->payloads = NULL;
    in->message.tensor_count = in->message.payload_count = 0;
    in->message.release = NULL;
    in->message.release_user = NULL;
    in->message.flags = 0;
    in->slots = NULL;
    in->transfers = NULL;
    in->wire = NULL;
    in->block = (uint32_t)size;
    in->credit = TPR_WIRE_SHORT + prefix_size + metadata_size;
    in->pending = in->transfer_count = 0;
    in->described = in->reading = false;
    in->prefix_size = prefix_size;
    in->status = TPRPC_OK;
    in->done = NULL;
    in->user = NULL;
    return in;
}

// Reads payloads and tensors. Returns the bytes of metadata and of items they announce, or fails the reader.
static void tpr_pipe_read_items(tpr_pipe_in *in, tpr_wire_reader *r, uint64_t *bytes, uint64_t *metadata) {
    for (size_t i = 0; i < in->message.payload_count + in->message.tensor_count && !r->failed; i++) {
        tpr_wire_item item;
        bool payload = i < in->message.payload_count;
        if (payload) tpr_wire_read_payload(r, &item, in->transfer_count);
        else tpr_wire_read_tensor(r, &item, in->transfer_count);
        if (r->failed) return;
        *metadata += item.metadata_size;
        *bytes = *bytes + item.size < *bytes ? UINT64_MAX : *bytes + item.size;
        memset(&in->slots[i], 0, sizeof in->slots[i]);
        in->slots[i].transfer = item.transfer;
        if (payload) {
            tprpc_payload *p = &in->payloads[i];
            p->data = NULL;
            p->size = (size_t)item.size;
            p->metadata_size = item.metadata_size;
            continue;
        }
        tprpc_tensor *t = &in->tensors[i - in->message.payload_count];
        memset(t, 0, sizeof *t);
        t->size = (size_t)item.size;
        t->dtype = item.dtype;
        t->ndim = item.ndim;
        t->device = item.device;
        t->target = item.target;
        memcpy(t->shape, item.shape, item.ndim * sizeof item.shape[0]);
        t->metadata_size = item.metadata_size;
    }
}

static const void *tpr_pipe_in_bytes(uint8_t **at, tpr_wire_reader *r, size_t size) {
    tpr_base_bytes bytes = tpr_wire_read_raw(r, size);
    void *to = *at;
    if (r->failed) return NULL;
    tpr_base_copy(to, bytes.data, bytes.size);
    *at += tpr_pipe_round_up(size);
    return to;
}

// Decodes a message into a block of its own. NULL: it was none (status PROTOCOL), over a limit or no memory (MEMORY).
static tpr_pipe_in *tpr_pipe_decode(tprpc_pipe *pipe, const uint8_t *body, size_t size, tprpc_status *status) {
    tpr_wire_reader r = tpr_wire_reader_of(body, size);
    const tprpc_limits *limits = &pipe->ctx->limits;
    tpr_wire_message head;
    uint64_t bytes = 0, metadata;
    *status = TPRPC_ERROR_PROTOCOL;
    tpr_wire_read_message(&r, &head);
    metadata = head.metadata_size;
    if (r.failed || (uint32_t)head.payloads + head.tensors > limits->tensors) return NULL;
    tpr_pipe_in *in = tpr_pipe_in_new(pipe, &head, size);
    if (!in) *status = TPRPC_ERROR_MEMORY;
    if (!in) return NULL;
    uint8_t *at = (uint8_t *)(uintptr_t)in->message.metadata;
    size_t count = in->message.payload_count + in->message.tensor_count;
    tpr_pipe_read_items(in, &r, &bytes, &metadata);
    if (bytes > limits->message_bytes || metadata > limits->metadata_bytes) r.failed = true;
    for (uint32_t k = 0; k < head.transfers && !r.failed; k++) {
        tpr_wire_read_transfer(&r, &in->wire[k]);
        if (in->wire[k].channel >= pipe->channel_count || !pipe->channels[in->wire[k].channel]->end) r.failed = true;
        if (r.failed) break;
        tpr_base_copy(at, in->wire[k].descriptor.data, in->wire[k].descriptor.size);
        in->wire[k].descriptor.data = at;
        at += tpr_pipe_round_up(in->wire[k].descriptor.size);
    }
    in->prefix_size = head.prefix_size;
    tpr_wire_read_into(&r, in->prefix, head.prefix_size);
    if (!r.failed) in->message.metadata = tpr_pipe_in_bytes(&at, &r, head.metadata_size);
    for (size_t i = 0; i < count && !r.failed; i++) {
        if (i < head.payloads) in->payloads[i].metadata = tpr_pipe_in_bytes(&at, &r, in->payloads[i].metadata_size);
        else
            in->tensors[i - head.payloads].metadata =
                tpr_pipe_in_bytes(&at, &r, in->tensors[i - head.payloads].metadata_size);
    }
    for (size_t i = 0; i < count && !r.failed; i++) {
        size_t n = i < head.payloads ? in->payloads[i].size : in->tensors[i - head.payloads].size;
        if (in->slots[i].transfer != TPR_WIRE_INLINE) continue;
        in->slots[i].bytes = (void *)(uintptr_t)tpr_pipe_in_bytes(&at, &r, n);
    }
    if (!r.failed) return in;
    tpr_base_pool_free(&pipe->loop->pool, in, in->block);
    return NULL;
}

// Where item i is to go: to what the user gave, or (data NULL) to memory of the library's on the device asked for.
static tprpc_buffer tpr_pipe_in_wanted(const tpr_pipe_in *in, size_t i, const tprpc_message *allocation) {
    tprpc_buffer to;
    memset(&to, 0, sizeof to);
    if (allocation) to = tpr_pipe_item(allocation, i);
    to.size = tpr_pipe_item(&in->message, i).size;
    if (to.data) return to;
    to.device.index = 0;
    to.device.kind = TPRPC_CPU;
    if (i < in->message.payload_count || in->slots[i].transfer == TPR_WIRE_INLINE) return to;
    const tprpc_tensor *t = &in->tensors[i - in->message.payload_count];
    to.device = t->target.kind == TPRPC_DEVICE_DEFAULT ? tpr_pipe_device(t->device) : t->target;
    return to;
}

// Asks the channels of a message for the sender's own memory, for what would need new memory of the host's.
static void tpr_pipe_in_adopt(tpr_pipe_in *in, const tprpc_message *allocation, tprpc_buffer *buffers) {
    const size_t count = in->message.payload_count + in->message.tensor_count;
    for (uint32_t k = 0; k < in->transfer_count; k++) {
        const tpr_pipe_channel *channel = in->pipe->channels[in->wire[k].channel];
        bool wanted = false, host = true;
        size_t n = 0;
        if (!channel->entry->backend->channel->adopt) continue;
        for (size_t i = 0; i < count; i++) {
            if (in->slots[i].transfer != k) continue;
            buffers[n] = tpr_pipe_in_wanted(in, i, allocation);
            wanted |= buffers[n].size && !buffers[n].data;
            host &= buffers[n++].device.kind == TPRPC_CPU;
        }
        if (!wanted || !host) continue;
        in->transfers[k].holder = channel->entry;
        in->transfers[k].hold = channel->entry->backend->channel->adopt(channel->end, in->wire[k].id, buffers, n);
        for (size_t i = n = 0; in->transfers[k].hold && i < count; i++) {
            if (in->slots[i].transfer != k) continue;
            if (!tpr_pipe_in_wanted(in, i, allocation).data) in->slots[i].bytes = buffers[n].data;
            n++;
        }
    }
}

// Where item i goes: to what the user gave, to the message's own block or the sender's memory, or to new memory on the
// device asked for.
static tprpc_status tpr_pipe_in_place(tpr_pipe_in *in, size_t i, const tprpc_message *allocation, tprpc_error *error) {
    tprpc_context *ctx = in->loop->context;
    bool payload = i < in->message.payload_count;
    tprpc_tensor *t = payload ? NULL : &in->tensors[i - in->message.payload_count];
    tpr_pipe_slot *slot = &in->slots[i];
    tprpc_buffer to = tpr_pipe_in_wanted(in, i, allocation);
    const size_t size = to.size;
    if (slot->transfer == TPR_WIRE_INLINE) {
        if (to.data && size && to.device.kind != TPRPC_CPU)
            return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                                   "item %zu came as host memory and was placed on a device", i);
        if (to.data) tpr_base_copy(to.data, slot->bytes, size);
        else to.data = slot->bytes;
    } else if (!to.data && slot->bytes) {
        to.data = slot->bytes;
    } else if (!to.data && to.device.kind == TPRPC_CPU) {
        to.data = slot->owned = tpr_base_pool_alloc(&in->loop->pool, size);
        slot->owned_size = size;
        if (!to.data)
            return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for %zu bytes of item %zu", size, i);
    } else if (!to.data) {
        const tpr_context_backend *entry = tpr_pipe_converter(ctx, to.device.kind);
        tprpc_tensor want = *t;
        want.device = to.device;
        if (!entry)
            return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "no converter allocates on device kind %d",
                                   (int)to.device.kind);
        tprpc_status status = entry->backend->converter->allocate(entry->backend->user, ctx, &want, error);
        if (status != TPRPC_OK) return status;
        to.data = slot->owned = want.data;
        to.stream = want.stream;
        slot->owned_size = size;
        slot->converter = entry;
        slot->device = to.device;
        slot->stream = want.stream;
    }
    if (payload) {
        in->payloads[i].data = to.data;
    } else {
        t->data = to.data;
        t->device = to.device;
        t->stream = to.stream;
    }
    return TPRPC_OK;
}

// Begins to receive what is not in the message's block. Ends in in->done, which may run within this call. allocation
// NULL: the library allocates; an item of it whose data is NULL likewise. refuse: nothing is received, and the
// sender's channels are told so.
static void tpr_pipe_in_read(tpr_pipe_in *in, const tprpc_message *allocation, bool refuse,
                             void (*done)(tpr_pipe_in *in)) {
    tprpc_pipe *pipe = in->pipe;
    size_t count = in->message.payload_count + in->message.tensor_count;
    tprpc_buffer *buffers = NULL;
    tprpc_error error;
    tprpc_status status = TPRPC_OK;
    in->done = done;
    in->pending = 1;
    in->reading = true;
    if (!count && !in->transfer_count && !refuse) {   // metadata alone: all is there
        tpr_pipe_in_done(in, TPRPC_OK, NULL);
        return;
    }
    error.status = TPRPC_OK;
    pipe->refs++;
    if (in->transfer_count && pipe->state == TPR_PIPE_ENDED) {
        error = pipe->error;
        status = pipe->status;
    } else if (in->transfer_count) {
        buffers = (tprpc_buffer *)tpr_base_pool_alloc(&pipe->loop->pool, count * sizeof *buffers);
        if (!buffers) tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory to receive a message");
        if (!buffers) status = tprpc_error_set(&error, TPRPC_ERROR_MEMORY, 0, "no memory to receive a message");
    }
    if (buffers && !refuse) tpr_pipe_in_adopt(in, allocation, buffers);
    for (size_t i = 0; i < count && status == TPRPC_OK && !refuse; i++)
        status = tpr_pipe_in_place(in, i, allocation, &error);
    if (status != TPRPC_OK) {          // the first failure is the one that is told, not what its transfers say of it
        refuse = true;
        in->status = status;
        in->error = error;
    }
    if (refuse && status == TPRPC_OK)
        status = tprpc_error_set(&error, TPRPC_ERROR_CANCELLED, 0, "the message was refused");
    for (uint32_t k = 0; k < in->transfer_count && buffers && pipe->state != TPR_PIPE_ENDED; k++) {
        tpr_pipe_transfer *transfer = &in->transfers[k];
        tpr_pipe_channel *channel = pipe->channels[in->wire[k].channel];
        size_t n = 0;
        for (size_t i = 0; i < count; i++)
            if (in->slots[i].transfer == k) buffers[n++] = tpr_pipe_item(&in->message, i);
        transfer->in = in;
        for (size_t i = 0; i < n; i++) transfer->large |= buffers[i].size >= TPR_PIPE_LARGE;
        transfer->place = pipe->receives++;
        in->pending++;
        tpr_pipe_transfer_begin(pipe, transfer, in->wire[k].id, in->wire[k].channel);
        tprpc_status got =
            channel->entry->backend->channel->recv(channel->end, &transfer->base.base, buffers, n,
                                                   in->wire[k].descriptor.data, in->wire[k].descriptor.size, &error);
        if (got != TPRPC_OK) {
            tpr_pipe_transfer_refused(transfer);
            tpr_pipe_in_done(in, got, &error);
        } else if (refuse && transfer->base.done) {
            tpr_pipe_abort(transfer, false);
        }
    }
    if (buffers) tpr_base_pool_free(&pipe->loop->pool, buffers, count * sizeof *buffers);
    tpr_pipe_in_done(in, status, status == TPRPC_OK ? NULL : &error);
    tpr_pipe_unref(pipe);
}

// ---- frames in

// A message has come in.
static inline void tpr_pipe_deliver(tprpc_pipe *pipe, tpr_pipe_in *in) {
    pipe->messages_received++;
    if (pipe->user) {
        tpr_pipe_consumed(pipe, in->credit);
        if (pipe->user) pipe->user->message(pipe->user, in);
        else tpr_pipe_in_free(in);
        return;
    }
    tpr_base_list_add(&pipe->arrived, &in->node);
    tpr_pipe_match(pipe);
}

static void tpr_pipe_on_message(tprpc_pipe *pipe, const uint8_t *body, size_t size) {
    tprpc_status status;
    if (pipe->state != TPR_PIPE_OPEN) {
        tpr_pipe_end(pipe, TPRPC_ERROR_PROTOCOL, 0, "the peer sent a message before the pipe was agreed");
        return;
    }
    tpr_pipe_in *in = tpr_pipe_decode(pipe, body, size, &status);
    if (!in) {
        tpr_pipe_end(pipe, status, 0,
                     status == TPRPC_ERROR_MEMORY ? "no memory for a message of %zu bytes"
                                                  : "the peer sent a broken message of %zu bytes",
                     size);
        return;
    }
    in->credit = (uint32_t)(size + TPR_WIRE_HEADER);
    tpr_pipe_deliver(pipe, in);
}

static void tpr_pipe_on_channel(tprpc_pipe *pipe, uint16_t index, const uint8_t *body, size_t size) {
    tpr_pipe_channel *channel = index < pipe->channel_count ? pipe->channels[index] : NULL;
    tprpc_status status = TPRPC_ERROR_PROTOCOL;
    if (channel && channel->end && size <= 4096)
        status = channel->entry->backend->channel->control(channel->end, body, size, pipe->handles, pipe->handle_count);
    for (uint32_t i = 0; i < pipe->handle_count; i++) tpr_os_close((int)pipe->handles[i]);
    pipe->handle_count = 0;
    if (status != TPRPC_OK)
        tpr_pipe_end(pipe, status, 0, "%s: the peer sent a broken control message",
                     channel && channel->entry ? channel->entry->backend->name : "an unknown channel");
}

static void tpr_pipe_on_frame(tprpc_pipe *pipe, const uint8_t *body) {
    const tpr_wire_frame frame = pipe->now.frame;
    tprpc_status status = TPRPC_ERROR_PEER;
    char text[200], peer[80], why[320];
    switch (frame.kind) {
    case TPR_WIRE_MESSAGE: tpr_pipe_on_message(pipe, body, frame.size); return;
    case TPR_WIRE_CHANNEL: tpr_pipe_on_channel(pipe, frame.channel, body, frame.size); return;
    case TPR_WIRE_HELLO: tpr_pipe_on_hello(pipe, body, frame.size); return;
    case TPR_WIRE_AGREE: tpr_pipe_on_agree(pipe, body, frame.size); return;
    case TPR_WIRE_CREDIT:
        if (frame.size < 8 || tpr_base_load_le64(body) < pipe->granted || tpr_base_load_le64(body) > pipe->sent) break;
        pipe->granted = tpr_base_load_le64(body);
        tpr_pipe_pump_out(pipe);
        return;
    case TPR_WIRE_BYE:
        tpr_pipe_peer(pipe, peer, sizeof peer);
        if (!tpr_wire_read_bye(body, frame.size, &status, text, sizeof text)) break;
        if (status == TPRPC_ERROR_CLOSED || status == TPRPC_OK) {
            snprintf(why, sizeof why, "%s closed the pipe", peer);
            tpr_pipe_part(pipe, TPRPC_ERROR_PEER, 0, why);
        } else {
            snprintf(why, sizeof why, "%s ended the pipe: %s", peer, text);
            tpr_pipe_part(pipe, status == TPRPC_ERROR_DENIED ? status : TPRPC_ERROR_PEER, 0, why);
        }
        return;
    case TPR_WIRE_WANT:
        if (frame.size < 4 || !pipe->connector || pipe->state != TPR_PIPE_OPEN) break;
        tpr_pipe_lanes_want(pipe, tpr_base_load_le32(body));
        return;
    case TPR_WIRE_LOST:
        if (pipe->state != TPR_PIPE_OPEN || !tpr_pipe_on_lost(pipe, body, frame.size)) break;
        return;
    default: break;
    }
    tpr_pipe_end(pipe, TPRPC_ERROR_PROTOCOL, 0, "the peer sent a broken frame of kind %u", (unsigned)frame.kind);
}

static inline void tpr_pipe_frame_over(tpr_pipe_conn *conn) {
    conn->dest = NULL;
    conn->header_have = conn->body_have = 0;
}

// Takes bytes of a connection into memory. Returns how many.
static size_t tpr_pipe_recv(tpr_pipe_conn *conn, void *to, size_t size) {
    tprpc_span span;
    span.data = to;
    span.size = size;
    size_t n = tpr_pipe_table(conn)->recv(conn->conn, &span, 1);
    conn->pipe->bytes_received += n;
    return n;
}

// Lets bytes go, in as many pieces as they lie there: for what is left there may be no further event.
static size_t tpr_pipe_skip(tpr_pipe_conn *conn, size_t size) {
    const tprpc_transport_table *table = tpr_pipe_table(conn);
    size_t skipped = 0, n = 1;
    while (skipped < size && n) {
        tprpc_span span = table->peek(conn->conn);
        n = span.size < size - skipped ? span.size : size - skipped;
        if (n) table->consume(conn->conn, n);
        skipped += n;
    }
    conn->pipe->bytes_received += skipped;
    return skipped;
}

// The header of a frame is there: what comes next?
static bool tpr_pipe_begin_frame(tpr_pipe_conn *conn) {
    tprpc_pipe *pipe = conn->pipe;
    uint64_t limit = (uint64_t)pipe->ctx->limits.metadata_bytes + TPR_PIPE_INLINE_ALL + TPR_WIRE_MESSAGE_HEADER +
                     (uint64_t)pipe->ctx->limits.tensors * 96 + TPR_WIRE_CHANNELS * (TPR_WIRE_DESCRIPTOR + 64);
    bool good = tpr_wire_get_frame(conn->header, limit, &conn->frame);
    const bool data = good && conn->frame.kind == TPR_WIRE_DATA;
    if (pipe->state == TPR_PIPE_GREETING)
        good = good && (conn->frame.kind == TPR_WIRE_HELLO || conn->frame.kind == TPR_WIRE_BYE);
    if (data)
        good = conn->frame.channel < pipe->channel_count && pipe->channels[conn->frame.channel]->end;
    if (!good || (conn != &pipe->now && !data)) {
        tpr_pipe_end(pipe, TPRPC_ERROR_PROTOCOL, 0,
                     pipe->state == TPR_PIPE_GREETING ? "the peer does not speak tprpc%s"
                                                      : "the peer sent no frame of ours%s",
                     "");
        return false;
    }
    if (data) return true;
    // One size for all small ones, which the handshake has used: so a frame cut in two allocates nothing later.
    pipe->body_block = conn->frame.size < TPR_PIPE_STACK ? (uint32_t)TPR_PIPE_STACK : conn->frame.size;
    pipe->body = (uint8_t *)tpr_base_pool_alloc(&pipe->loop->pool, pipe->body_block);
    if (!pipe->body)
        tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory for a frame of %u bytes", (unsigned)conn->frame.size);
    return pipe->body != NULL;
}

// A chunk of bulk goes straight to where its channel says, and the header behind it to where headers go: in a stream
// nothing passes through the connection's own buffer. Returns whether the chunk is over.
static bool tpr_pipe_take_data(tpr_pipe_conn *conn) {
    tprpc_pipe *pipe = conn->pipe;
    uint32_t size = conn->frame.size - TPR_WIRE_DATA_HEADER, left = size - conn->body_have;
    const size_t most = tpr_pipe_quantum(conn, left);
    tpr_pipe_channel *channel = pipe->channels[conn->frame.channel];
    bool there = conn->dest != NULL;
    tprpc_span spans[2];
    size_t n, ahead = 0;
    if (there) {
        spans[0].data = (uint8_t *)conn->dest + conn->body_have;
        spans[0].size = most;
        spans[1].data = conn->header;  // its own fields are in conn->frame and conn->data_... by now
        spans[1].size = TPR_WIRE_HEADER;
        n = tpr_pipe_table(conn)->recv(conn->conn, spans, most == left ? 2 : 1);
        pipe->bytes_received += n;
        if (n > left) ahead = n - left;
    } else {
        n = tpr_pipe_skip(conn, left);
    }
    conn->body_have += (uint32_t)(n - ahead);
    if (conn->body_have < size) return n == most;   // there may be more of it
    uint64_t transfer = conn->data_transfer, offset = conn->data_offset;
    tpr_pipe_frame_over(conn);
    conn->bulk_received += size;
    conn->header_have = (uint32_t)ahead;
    if (there) channel->entry->backend->channel->bulk_done(channel->end, transfer, offset, size);
    return conn->header_have < TPR_WIRE_HEADER || (pipe->state != TPR_PIPE_ENDED && tpr_pipe_begin_frame(conn));
}

// One step of a frame that does not lie in the connection's buffer in one piece. False: more bytes must come first.
static bool tpr_pipe_take_piece(tpr_pipe_conn *conn) {
    tprpc_pipe *pipe = conn->pipe;
    uint32_t want = TPR_WIRE_HEADER;
    if (conn->header_have >= want && conn->frame.kind == TPR_WIRE_DATA) want += TPR_WIRE_DATA_HEADER;
    if (conn->header_have < want) {
        size_t n = tpr_pipe_recv(conn, conn->header + conn->header_have, want - conn->header_have);
        conn->header_have += (uint32_t)n;
        if (conn->header_have < want) return false;
        if (want == TPR_WIRE_HEADER) return tpr_pipe_begin_frame(conn);
        tpr_pipe_channel *channel = pipe->channels[conn->frame.channel];
        conn->data_transfer = tpr_base_load_le64(conn->header + TPR_WIRE_HEADER);
        conn->data_offset = tpr_base_load_le64(conn->header + TPR_WIRE_HEADER + 8);
        conn->dest = channel->entry->backend->channel->bulk(channel->end, conn->data_transfer, conn->data_offset,
                                                            conn->frame.size - TPR_WIRE_DATA_HEADER);
    }
    if (conn->frame.kind == TPR_WIRE_DATA) return tpr_pipe_take_data(conn);
    while (pipe->handle_count < conn->frame.handles) {
        size_t n = tpr_pipe_table(conn)->take_handles(conn->conn, pipe->handles + pipe->handle_count,
                                                      conn->frame.handles - pipe->handle_count);
        if (!n) return false;
        pipe->handle_count += (uint32_t)n;
    }
    if (conn->body_have < conn->frame.size)
        conn->body_have +=
            (uint32_t)tpr_pipe_recv(conn, pipe->body + conn->body_have, conn->frame.size - conn->body_have);
    if (conn->body_have < conn->frame.size) return false;
    uint8_t *body = pipe->body;
    uint32_t block = pipe->body_block;
    pipe->body = NULL;
    tpr_pipe_frame_over(conn);
    tpr_pipe_on_frame(pipe, body);
    tpr_base_pool_free(&pipe->loop->pool, body, block);
    return true;
}

// The short path: a short message that lies in the connection's buffer whole goes straight into its block. Its heads
// are copied before they are checked, for a peer may still write to them.
static inline bool tpr_pipe_take_short(tprpc_pipe *pipe, tprpc_span span) {
    uint8_t head[TPR_WIRE_SHORT], prefix_size;
    const uint8_t *bytes = (const uint8_t *)span.data;
    uint32_t metadata_size;
    if (span.size < sizeof head || pipe->state != TPR_PIPE_OPEN) return false;
    memcpy(head, bytes, sizeof head);
    if (!tpr_wire_get_short(head, &metadata_size, &prefix_size) || metadata_size > TPR_PIPE_SHORT ||
        metadata_size > pipe->ctx->limits.metadata_bytes) return false;
    size_t size = sizeof head + prefix_size + metadata_size;
    if (span.size < size) return false;
    tpr_pipe_in *in = tpr_pipe_in_short(pipe, metadata_size, prefix_size);
    if (TPR_UNLIKELY(!in)) return false;   // the general path says so
    tpr_loop_saw_small(pipe->loop);
    bytes += sizeof head;
    tpr_base_copy_few(in->prefix, bytes, prefix_size);
    if (metadata_size) memcpy((void *)(uintptr_t)in->message.metadata, bytes + prefix_size, metadata_size);
    tpr_pipe_table(&pipe->now)->consume(pipe->now.conn, size);
    pipe->bytes_received += size;
    tpr_pipe_deliver(pipe, in);
    return true;
}

// A frame that lies in the connection's buffer whole is copied to the stack, then read: a peer may still write to it.
static bool tpr_pipe_take_whole(tprpc_pipe *pipe, tprpc_span span) {
    uint8_t stack[TPR_PIPE_STACK];
    const tprpc_transport_table *table = tpr_pipe_table(&pipe->now);
    if (span.size < TPR_WIRE_HEADER) return false;
    tpr_wire_frame *frame = &pipe->now.frame;
    memcpy(pipe->now.header, span.data, TPR_WIRE_HEADER);
    if (!tpr_wire_get_frame(pipe->now.header, TPR_PIPE_STACK, frame) || frame->kind == TPR_WIRE_DATA ||
        frame->handles || frame->size > sizeof stack || span.size - TPR_WIRE_HEADER < frame->size ||
        pipe->state < TPR_PIPE_OPEN) return false;
    memcpy(stack, (const uint8_t *)span.data + TPR_WIRE_HEADER, frame->size);
    table->consume(pipe->now.conn, TPR_WIRE_HEADER + frame->size);
    pipe->bytes_received += TPR_WIRE_HEADER + frame->size;
    tpr_pipe_on_frame(pipe, stack);
    return true;
}

// Takes in what has come, up to a round. Where the loop was idle since the last time, one message: its callback comes
// before a look at what follows it, a line of the peer's that costs a trip between the caches (70 ns there and back).
static void tpr_pipe_pump_in(tprpc_pipe *pipe) {
    if (pipe->pumping || !pipe->now.conn) return;
    uint64_t stop = pipe->bytes_received + tpr_pipe_quantum(&pipe->now, TPR_PIPE_ROUND / 2);
    uint64_t last = pipe->messages_received;
    last += pipe->idle_turns == pipe->loop->idle_turns ? (uint64_t)TPR_PIPE_BATCH : 1;
    pipe->idle_turns = pipe->loop->idle_turns;
    pipe->pumping = true;
    pipe->refs++;
    while (pipe->state != TPR_PIPE_ENDED && pipe->now.conn) {
        const tprpc_transport_table *table = tpr_pipe_table(&pipe->now);
        if (pipe->bytes_received >= stop || pipe->messages_received >= last) {
            if (!(table->flags & TPRPC_TRANSPORT_REPEATS)) tpr_pipe_resume_later(pipe);
            break;
        }
        if (pipe->now.header_have == 0) {
            tprpc_span span = table->peek(pipe->now.conn);
            if (!span.size) break;     // asking by recv for a frame's first bytes could cost a system call
            if (tpr_pipe_take_short(pipe, span) || tpr_pipe_take_whole(pipe, span)) continue;
        }
        if (pipe->state == TPR_PIPE_ENDED || !tpr_pipe_take_piece(&pipe->now)) break;
    }
    pipe->pumping = false;
    tpr_pipe_unref(pipe);
}

// The same for a lane.
static void tpr_pipe_lane_pump_in(tpr_pipe_lane *lane) {
    tpr_pipe_conn *conn = &lane->conn;
    tprpc_pipe *pipe = conn->pipe;
    if (lane->state != TPR_PIPE_LANE_OPEN) return;
    uint64_t stop = pipe->bytes_received + tpr_pipe_quantum(conn, TPR_PIPE_ROUND / 2);
    pipe->refs++;
    while (pipe->state != TPR_PIPE_ENDED && lane->state == TPR_PIPE_LANE_OPEN) {
        if (pipe->bytes_received >= stop) {
            if (!(tpr_pipe_table(conn)->flags & TPRPC_TRANSPORT_REPEATS)) tpr_pipe_resume_later(pipe);
            break;
        }
        if (conn->header_have == 0 && !tpr_pipe_table(conn)->peek(conn->conn).size) break;
        if (!tpr_pipe_take_piece(conn)) break;
    }
    tpr_pipe_unref(pipe);
}

static void tpr_pipe_resume(tprpc_work *work) {
    tprpc_pipe *pipe = TPR_CONTAINER(work, tprpc_pipe, resume);
    pipe->resume_set = false;
    tpr_pipe_pump_in(pipe);
    tpr_pipe_pump_out(pipe);
    for (uint32_t i = 0; i < TPR_CONTEXT_LANES && pipe->lanes_open; i++) {
        if (!pipe->lanes[i]) continue;
        tpr_pipe_lane_pump_in(pipe->lanes[i]);
        tpr_pipe_lane_pump_out(pipe->lanes[i]);
    }
    tpr_pipe_unref(pipe);
}

// ---- operations of a user's

static void tpr_pipe_op_run(tpr_loop_task *task) {
    tpr_pipe_op *op = TPR_CONTAINER(task, tpr_pipe_op, task);
    const tprpc_error *error = op->status == TPRPC_OK ? NULL : &op->error;
    const tprpc_message *message = op->in && op->status == TPRPC_OK ? &op->in->message : NULL;
    if (op->release) op->release(op->release_user);
    switch (op->kind) {
    case TPR_PIPE_ACCEPT: op->fn.accepted(op->status, op->status == TPRPC_OK ? op->pipe : NULL, error, op->user); break;
    case TPR_PIPE_WRITE: if (op->fn.written) op->fn.written(op->status, error, op->user); break;
    case TPR_PIPE_DESCRIBE: op->fn.described(op->status, message, error, op->user); break;
    default: if (op->fn.read) op->fn.read(op->status, message, error, op->user); break;
    }
}

static void tpr_pipe_listener_unref(tprpc_listener *listener);

static void tpr_pipe_op_done(tpr_loop_task *task) {
    tpr_pipe_op *op = TPR_CONTAINER(task, tpr_pipe_op, task);
    tprpc_pipe *pipe = op->pipe;       // NULL: of an accept that failed
    tpr_loop *loop = pipe ? pipe->loop : op->listener->loop;
    if (op->kind == TPR_PIPE_READ && op->in) tpr_pipe_in_free(op->in);
    if (op->listener) tpr_pipe_listener_unref(op->listener);
    tpr_base_pool_free(&loop->pool, op, sizeof *op);
    if (pipe) tpr_pipe_unref(pipe);
}

static tpr_pipe_op *tpr_pipe_op_new(tpr_loop *loop, int32_t kind, void *user) {
    tpr_pipe_op *op = (tpr_pipe_op *)tpr_base_pool_alloc(&loop->pool, sizeof *op);
    if (!op) return NULL;
    op->task.begin = NULL;
    op->task.run = tpr_pipe_op_run;
    op->task.done = tpr_pipe_op_done;
    op->task.busy = NULL;
    tpr_base_list_init(&op->node);
    op->kind = kind;
    op->finished = false;
    op->status = TPRPC_OK;
    op->pipe = NULL;
    op->listener = NULL;
    op->in = NULL;
    op->release = NULL;
    op->user = user;
    op->allocation = NULL;
    return op;
}

// Queues the callback of an operation that has ended; on an ordered pipe, after those issued before it.
static void tpr_pipe_op_finish(tpr_pipe_op *op, tpr_base_list *list) {
    tprpc_pipe *pipe = op->pipe;
    op->finished = true;
    if (!pipe->ordered) {
        tpr_base_list_remove(&op->node);
        tpr_loop_post(pipe->loop, &op->task);
        return;
    }
    while (!tpr_base_list_empty(list)) {
        tpr_pipe_op *first = TPR_CONTAINER(list->next, tpr_pipe_op, node);
        if (!first->finished) return;
        tpr_base_list_remove(&first->node);
        tpr_loop_post(pipe->loop, &first->task);
    }
}

// Ends the reads that have no message yet. On an ordered pipe the end of one lets those behind it go, so all are marked
// before the first is let go.
TPR_COLD static void tpr_pipe_fail_reads(tprpc_pipe *pipe) {
    for (tpr_base_list *node = pipe->reads.next; node != &pipe->reads; node = node->next) {
        tpr_pipe_op *op = TPR_CONTAINER(node, tpr_pipe_op, node);
        if (op->finished || op->in) continue;
        op->status = pipe->status;
        op->error = pipe->error;
        op->finished = true;
    }
    for (tpr_base_list *node = pipe->reads.next, *next; node != &pipe->reads; node = next) {
        tpr_pipe_op *op = TPR_CONTAINER(node, tpr_pipe_op, node);
        next = node->next;
        if (!op->finished && pipe->ordered) return;
        if (!op->finished) continue;
        tpr_base_list_remove(node);
        tpr_loop_post(pipe->loop, &op->task);
    }
}

static void tpr_pipe_op_written(tpr_pipe_write *write) {
    tpr_pipe_op *op = TPR_CONTAINER(write, tpr_pipe_op, write);
    op->status = write->status;
    if (op->status != TPRPC_OK) op->error = write->error;
    tpr_pipe_op_finish(op, &op->pipe->write_ops);
}

static void tpr_pipe_op_read_done(tpr_pipe_in *in) {
    tpr_pipe_op *op = (tpr_pipe_op *)in->user;
    op->status = in->status;
    if (op->status != TPRPC_OK) op->error = in->error;
    tpr_pipe_op_finish(op, &op->pipe->reads);
}

// Begins the read of a message that is there.
static void tpr_pipe_op_read(tpr_pipe_op *op, tpr_pipe_in *in, const tprpc_message *allocation) {
    op->in = in;
    in->user = op;
    tpr_base_list_remove(&in->node);
    if (op->pipe->state != TPR_PIPE_ENDED) tpr_pipe_consumed(op->pipe, in->credit);
    tpr_pipe_in_read(in, allocation, false, tpr_pipe_op_read_done);
}

// The oldest message that arrived and is described, or not. Those described come first, and are few.
static tpr_pipe_in *tpr_pipe_arrived(tprpc_pipe *pipe, bool described) {
    for (tpr_base_list *i = pipe->arrived.next; i != &pipe->arrived; i = i->next) {
        tpr_pipe_in *in = TPR_CONTAINER(i, tpr_pipe_in, node);
        if (in->described == described) return in;
        if (described) return NULL;
    }
    return NULL;
}

// The first operation that waits for a message, which it waits for no longer; NULL: none does.
static inline tpr_pipe_op *tpr_pipe_take_waiting(tprpc_pipe *pipe) {
    if (pipe->waiting == &pipe->reads) return NULL;
    tpr_pipe_op *op = TPR_CONTAINER(pipe->waiting, tpr_pipe_op, node);
    do pipe->waiting = pipe->waiting->next;
    while (pipe->waiting != &pipe->reads && TPR_CONTAINER(pipe->waiting, tpr_pipe_op, node)->in);
    return op;
}

// Gives a message to the operation that waited for it.
static inline void tpr_pipe_give(tpr_pipe_op *op, tpr_pipe_in *in) {
    in->described = true;
    if (op->kind != TPR_PIPE_DESCRIBE) {
        tpr_pipe_op_read(op, in, NULL);
        return;
    }
    op->in = in;
    tpr_pipe_op_finish(op, &op->pipe->reads);
}

// Gives messages that arrived to operations that wait for them, in order.
static void tpr_pipe_match(tprpc_pipe *pipe) {
    tpr_pipe_in *in;
    pipe->refs++;
    while (pipe->waiting != &pipe->reads && (in = tpr_pipe_arrived(pipe, false)) != NULL)
        tpr_pipe_give(tpr_pipe_take_waiting(pipe), in);
    tpr_pipe_unref(pipe);
}

// ---- the end

TPR_COLD static void tpr_pipe_disconnect(tpr_pipe_conn *conn, tprpc_status cause) {
    void *old = conn->conn;
    conn->conn = NULL;
    if (old) tpr_pipe_table(conn)->disconnect(old, cause);
}

TPR_COLD static void tpr_pipe_say_bye(tprpc_pipe *pipe, tprpc_status status) {
    uint8_t body[256];
    tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
    if (!pipe->now.conn || pipe->state == TPR_PIPE_CONNECTING || pipe->current || pipe->now.chunk_size) return;
    tpr_wire_write_bye(&w, status, pipe->closed ? "" : pipe->error.text);
    if (!w.failed) tpr_pipe_control(pipe, TPR_WIRE_BYE, 0, body, (size_t)(w.at - body), NULL, 0);
}

TPR_COLD static void tpr_pipe_drop_out(tprpc_pipe *pipe) {
    if (pipe->current) tpr_pipe_frame_done(pipe, pipe->current, pipe->status, &pipe->error);
    pipe->current = NULL;
    while (pipe->urgent.head)
        tpr_pipe_frame_done(pipe, tpr_pipe_frames_take(&pipe->urgent), pipe->status, &pipe->error);
    while (pipe->messages.head)
        tpr_pipe_frame_done(pipe, tpr_pipe_frames_take(&pipe->messages), pipe->status, &pipe->error);
    while (pipe->bulk) {
        tpr_pipe_bulk *bulk = pipe->bulk;
        tprpc_work *taken = bulk->taken;
        pipe->bulk = bulk->next;
        if (!pipe->bulk) pipe->bulk_tail = &pipe->bulk;
        tpr_base_pool_free(&pipe->loop->pool, bulk, sizeof *bulk);
        taken->run(taken);
    }
    pipe->now.chunk_size = 0;
}

// Asks every transfer to end; each does so now or later.
TPR_COLD static void tpr_pipe_abort_all(tprpc_pipe *pipe) {
    tpr_base_list aborting;
    tpr_base_list_init(&aborting);
    while (!tpr_base_list_empty(&pipe->transfers)) {
        tpr_base_list *node = pipe->transfers.next;
        tpr_base_list_remove(node);
        tpr_base_list_add(&aborting, node);
    }
    while (!tpr_base_list_empty(&aborting)) {
        tpr_base_list *node = aborting.next;
        tpr_base_list_remove(node);
        tpr_base_list_add(&pipe->transfers, node);
        tpr_pipe_abort(TPR_CONTAINER(node, tpr_pipe_transfer, node), true);
    }
}

// Ends the pipe, once: everything of it ends with this status.
TPR_COLD static void tpr_pipe_end(tprpc_pipe *pipe, tprpc_status status, int32_t os_code, const char *why, ...) {
    va_list args;
    if (pipe->state == TPR_PIPE_ENDED) return;
    pipe->refs++;
    pipe->status = pipe->error.status = status;
    pipe->error.os_code = os_code;
    va_start(args, why);
    vsnprintf(pipe->error.text, sizeof pipe->error.text, why, args);
    va_end(args);
    if (status != TPRPC_ERROR_PEER && status != TPRPC_ERROR_MEMORY) tpr_pipe_say_bye(pipe, status);
    if (pipe->state == TPR_PIPE_ENDED) {   // saying so has failed, and ended it
        tpr_pipe_unref(pipe);
        return;
    }
    pipe->state = TPR_PIPE_ENDED;
    tpr_timer_cancel(&pipe->loop->wheel, &pipe->timer);
    tpr_process_unwatch(&pipe->process);
    if (!pipe->closed) TPR_LOG(&pipe->ctx->env.logger, TPRPC_LOG_DEBUG, "pipe", "", "ended: %s", pipe->error.text);
    tpr_pipe_disconnect(&pipe->next, status);
    tpr_pipe_disconnect(&pipe->now, status);
    tpr_pipe_lanes_end(pipe, status);
    tpr_pipe_abort_all(pipe);
    tpr_pipe_drop_out(pipe);
    for (tpr_base_list *node = pipe->writes.next, *next; node != &pipe->writes; node = next) {
        tpr_pipe_write *write = TPR_CONTAINER(node, tpr_pipe_write, node);
        next = node->next;
        if (!write->parked) continue;
        write->parked = NULL;
        tpr_pipe_write_done(write, pipe->status, &pipe->error);
    }
    tpr_pipe_fail_reads(pipe);
    pipe->waiting = &pipe->reads;
    tpr_base_pool_free(&pipe->loop->pool, pipe->body, pipe->body_block);
    pipe->body = NULL;
    tpr_pipe_frame_over(&pipe->now);
    for (uint32_t i = 0; i < pipe->handle_count; i++) tpr_os_close((int)pipe->handles[i]);
    pipe->handle_count = 0;
    if (pipe->user) pipe->user->ended(pipe->user);
    if (pipe->listener) tpr_pipe_listener_lost(pipe);
    tpr_pipe_unref(pipe);
}

// ---- agreeing: hello, the move to the best transport, the proof of channels

static void tpr_pipe_conn_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error);

TPR_COLD
static tprpc_pipe *tpr_pipe_new(tprpc_context *ctx, tpr_loop *loop, bool connector, bool ordered, tprpc_error *error) {
    if (TPR_ATOMIC_ADD(&ctx->pipes, 1u) >= ctx->limits.pipes) {
        TPR_ATOMIC_SUB(&ctx->pipes, 1u);
        tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "the context has its %u pipes (limits.pipes)",
                        (unsigned)ctx->limits.pipes);
        return NULL;
    }
    tprpc_pipe *pipe = (tprpc_pipe *)tpr_context_alloc(ctx, sizeof *pipe);
    if (!pipe || tpr_os_random(pipe->token, 16) != 0 || tpr_os_random(pipe->nonce, 16) != 0) {
        tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a pipe");
        tpr_context_free(ctx, pipe, sizeof *pipe);
        TPR_ATOMIC_SUB(&ctx->pipes, 1u);
        return NULL;
    }
    pipe->ctx = ctx;
    pipe->loop = loop;
    pipe->connector = connector;
    pipe->ordered = ordered;
    pipe->object.close = tpr_pipe_object_close;
    pipe->now.pipe = pipe->next.pipe = pipe;
    pipe->now.owner.event = pipe->next.owner.event = tpr_pipe_conn_event;
    pipe->message_bytes = ctx->limits.message_bytes;
    pipe->metadata_bytes = ctx->limits.metadata_bytes;
    pipe->tensors = ctx->limits.tensors < 65535 ? ctx->limits.tensors : 65535;
    pipe->resume.run = tpr_pipe_resume;
    pipe->resume.loop = pipe->timer.loop = loop->index;
    pipe->timer.run = tpr_pipe_timed_out;
    pipe->process.ended = tpr_pipe_process_ended;
    pipe->urgent.tail = &pipe->urgent.head;
    pipe->messages.tail = &pipe->messages.head;
    pipe->bulk_tail = &pipe->bulk;
    pipe->next_transfer = 1;
    tpr_base_list_init(&pipe->listener_node);
    tpr_base_list_init(&pipe->home_node);
    tpr_base_list_init(&pipe->arrived);
    tpr_base_list_init(&pipe->reads);
    pipe->waiting = &pipe->reads;
    tpr_base_list_init(&pipe->writes);
    tpr_base_list_init(&pipe->write_ops);
    tpr_base_list_init(&pipe->transfers);
    tpr_base_list_add(&loop->objects, &pipe->object.node);
    return pipe;
}

TPR_COLD static void tpr_pipe_send_hello(tprpc_pipe *pipe) {
    tprpc_context *ctx = pipe->ctx;
    uint8_t body[TPR_WIRE_FIRST];
    tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
    tpr_wire_hello *hello = (tpr_wire_hello *)tpr_context_alloc(ctx, sizeof *hello);
    if (!hello) {
        tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory to say hello");
        return;
    }
    hello->major = TPR_WIRE_MAJOR;
    hello->minor = TPR_WIRE_MINOR;
    memcpy(hello->nonce, ctx->nonce, 16);
    memcpy(hello->token, pipe->token, 16);
    hello->message_bytes = ctx->limits.message_bytes;
    hello->metadata_bytes = ctx->limits.metadata_bytes;
    hello->space = ctx->process_space;
    hello->process = (uint32_t)tpr_os_pid();
    hello->tensors = ctx->limits.tensors;
    hello->window = TPR_PIPE_WINDOW;
    for (uint32_t i = 0; i < ctx->backend_count; i++) {
        const tpr_context_backend *entry = &ctx->backends[i];
        const tprpc_backend *backend = entry->backend;
        tpr_wire_offer *offer = &hello->offers[hello->offer_count];
        if (!entry->viable || backend->converter || hello->offer_count == TPR_WIRE_OFFERS) continue;
        void *instance = entry->instances[pipe->loop->index];
        snprintf(offer->name, sizeof offer->name, "%s", backend->name);
        offer->channel = backend->channel != NULL;
        offer->domain_size =
            (uint8_t)(offer->channel ? backend->channel->domain(instance, offer->domain, sizeof offer->domain)
                                     : backend->transport->domain(instance, offer->domain, sizeof offer->domain));
        for (uint32_t a = 0; pipe->listener && !offer->channel && a < pipe->listener->count; a++)
            if (pipe->listener->addresses[a].entry == entry)
                snprintf(offer->address, sizeof offer->address, "%s",
                         strstr(pipe->listener->addresses[a].address, "://") + 3);
        hello->offer_count++;
    }
    tpr_wire_write_hello(&w, hello);
    tpr_context_free(ctx, hello, sizeof *hello);
    if (w.failed)
        tpr_pipe_end(pipe, TPRPC_ERROR_LIMIT, 0, "the offers of this context's backends do not fit into a hello");
    else tpr_pipe_control(pipe, TPR_WIRE_HELLO, 0, body, (size_t)(w.at - body), NULL, 0);
}

TPR_COLD static const tpr_wire_offer *tpr_pipe_offer(const tprpc_pipe *pipe, const tpr_context_backend *entry) {
    for (uint32_t i = 0; i < pipe->hello->offer_count; i++) {
        const tpr_wire_offer *offer = &pipe->hello->offers[i];
        if (offer->channel == (entry->backend->channel != NULL) && strcmp(offer->name, entry->backend->name) == 0)
            return offer;
    }
    return NULL;
}

// What the two have in common.
static void tpr_pipe_compare(tprpc_pipe *pipe) {
    tprpc_context *ctx = pipe->ctx;
    for (uint32_t i = 0; i < ctx->backend_count; i++) {
        const tpr_context_backend *entry = &ctx->backends[i];
        const tpr_wire_offer *offer = entry->viable && !entry->backend->converter ? tpr_pipe_offer(pipe, entry) : NULL;
        void *instance = entry->instances[pipe->loop->index];
        if (!offer) continue;
        pipe->offered |= 1u << i;
        if (offer->channel ? entry->backend->channel->reaches(instance, offer->domain, offer->domain_size)
                           : entry->backend->transport->reaches(instance, offer->domain, offer->domain_size))
            pipe->reached |= 1u << i;
    }
}

// The connector's first step of the proof: its challenges.
static void tpr_pipe_add_channel(tprpc_pipe *pipe, const tpr_context_backend *entry, tpr_wire_proof *proof) {
    tprpc_error error = TPR_ZERO;
    tpr_pipe_channel *channel = (tpr_pipe_channel *)tpr_context_alloc(pipe->ctx, sizeof *channel);
    if (!channel) {
        tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory for a channel");
        return;
    }
    channel->link.control = tpr_pipe_link_control;
    channel->link.bulk = tpr_pipe_link_bulk;
    channel->link.transport = tpr_pipe_link_transport;
    channel->link.process = tpr_pipe_link_process;
    channel->pipe = pipe;
    channel->entry = entry;
    channel->index = (uint16_t)pipe->channel_count;
    pipe->channels[pipe->channel_count++] = channel;
    if (!entry) return;                // the peer's, which we do not have: it keeps its index
    const tprpc_channel_table *table = entry->backend->channel;
    if (table->attach(entry->instances[pipe->loop->index], &channel->link, &channel->end, &error) != TPRPC_OK) {
        channel->end = NULL;
        snprintf(channel->why, sizeof channel->why, "%.109s", error.text);
        TPR_LOG(&pipe->ctx->env.logger, TPRPC_LOG_INFO, "pipe", "", "%s: %s", entry->backend->name, error.text);
        return;
    }
    if (table->challenge)
        proof->challenge_size = (uint32_t)table->challenge(channel->end, proof->challenge, TPR_WIRE_PROOF);
    if (!table->challenge || !proof->challenge_size) channel->proved = true;
}

static void tpr_pipe_send_agree(tprpc_pipe *pipe, const tpr_wire_agree *agree) {
    uint8_t body[TPR_WIRE_CONTROL];
    tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
    tpr_wire_write_agree(&w, agree);
    if (w.failed) tpr_pipe_end(pipe, TPRPC_ERROR_LIMIT, 0, "the proofs of the channels do not fit into a frame");
    else tpr_pipe_control(pipe, TPR_WIRE_AGREE, 0, body, (size_t)(w.at - body), NULL, 0);
}

TPR_COLD static void tpr_pipe_agree(tprpc_pipe *pipe) {
    tpr_wire_agree *agree = (tpr_wire_agree *)tpr_context_alloc(pipe->ctx, sizeof *agree);
    pipe->state = TPR_PIPE_AGREEING;
    if (!agree) {
        tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory to agree on channels");
        return;
    }
    agree->step = 1;
    for (uint32_t i = 0; i < pipe->ctx->backend_count && agree->count < TPR_WIRE_CHANNELS; i++) {
        const tpr_context_backend *entry = &pipe->ctx->backends[i];
        if (!entry->backend->channel || !(pipe->reached & 1u << i) || pipe->state == TPR_PIPE_ENDED) continue;
        tpr_wire_proof *proof = &agree->proofs[agree->count++];
        snprintf(proof->name, sizeof proof->name, "%s", entry->backend->name);
        tpr_pipe_add_channel(pipe, entry, proof);
    }
    if (pipe->state != TPR_PIPE_ENDED) tpr_pipe_send_agree(pipe, agree);
    tpr_context_free(pipe->ctx, agree, sizeof *agree);
}

// What the channel that would move host memory says of buffers that are better sent within the message.
TPR_COLD static uint32_t tpr_pipe_inline_advice(tprpc_pipe *pipe) {
    tprpc_device host = TPR_ZERO;
    host.kind = TPRPC_CPU;
    const tpr_pipe_channel *channel = tpr_pipe_pick(pipe, host, host, NULL, 0, NULL);
    uint32_t advice = channel ? channel->entry->backend->channel->inline_bytes : 0, most = TPR_PIPE_INLINE_ALL;
    if (!advice) advice = TPR_PIPE_INLINE;
    return advice < most ? advice : most;
}

// The pipe is open: what was parked goes out, and whoever waits is told.
TPR_COLD static void tpr_pipe_open(tprpc_pipe *pipe) {
    pipe->state = TPR_PIPE_OPEN;
    pipe->inline_bytes = tpr_pipe_inline_advice(pipe);
    if (pipe->orphaned) tpr_pipe_set_timer(pipe, TPR_PIPE_MOURN_MS);
    else tpr_timer_cancel(&pipe->loop->wheel, &pipe->timer);
    tpr_context_free(pipe->ctx, pipe->hello, sizeof *pipe->hello);
    pipe->hello = NULL;
    if (pipe->listener) tpr_pipe_listener_open(pipe);
    if (pipe->user && pipe->user->opened) pipe->user->opened(pipe->user);
    if (pipe->state == TPR_PIPE_OPEN) tpr_pipe_unpark(pipe);
}

// Judges answers, takes verdicts, and answers challenges, as far as the peer's step has them.
TPR_COLD static void tpr_pipe_prove(tprpc_pipe *pipe, const tpr_wire_agree *theirs, tpr_wire_agree *ours) {
    for (uint32_t i = 0; i < pipe->channel_count; i++) {
        tpr_pipe_channel *channel = pipe->channels[i];
        const tpr_wire_proof *proof = &theirs->proofs[i];
        tpr_wire_proof *reply = &ours->proofs[i];
        tprpc_error error = TPR_ZERO;
        snprintf(reply->name, sizeof reply->name, "%s", proof->name);
        if (!channel->end) continue;
        const tprpc_channel_table *table = channel->entry->backend->channel;
        if (table->challenge && proof->answer_size) {
            channel->proved = table->verify(channel->end, proof->answer, proof->answer_size, &error) == TPRPC_OK;
            channel->why[0] = 0;
            if (!channel->proved) snprintf(channel->why, sizeof channel->why, "its proof failed: %.90s", error.text);
            if (!channel->proved)
                TPR_LOG(&pipe->ctx->env.logger, TPRPC_LOG_INFO, "pipe", "", "%s: %s", channel->entry->backend->name,
                        error.text);
        }
        if (table->answer && proof->challenge_size)
            reply->answer_size = (uint32_t)table->answer(channel->end, proof->challenge, proof->challenge_size,
                                                         reply->answer, TPR_WIRE_PROOF);
        if (theirs->step >= 3) channel->verdict = proof->verdict;
        reply->verdict = channel->proved;
    }
}

// The acceptor's answer to the first step: the channels in the connector's order.
TPR_COLD static void tpr_pipe_accept_channels(tprpc_pipe *pipe, const tpr_wire_agree *theirs, tpr_wire_agree *ours) {
    for (uint32_t i = 0; i < theirs->count && pipe->state != TPR_PIPE_ENDED; i++) {
        const tpr_context_backend *found = NULL;
        for (uint32_t b = 0; b < pipe->ctx->backend_count; b++) {
            const tpr_context_backend *entry = &pipe->ctx->backends[b];
            if (entry->backend->channel && (pipe->reached & 1u << b) &&
                strcmp(entry->backend->name, theirs->proofs[i].name) == 0)
                found = entry;
        }
        tpr_pipe_add_channel(pipe, found, &ours->proofs[i]);
    }
}

TPR_COLD static void tpr_pipe_on_agree(tprpc_pipe *pipe, const uint8_t *body, size_t size) {
    tpr_wire_agree *both = (tpr_wire_agree *)tpr_context_alloc(pipe->ctx, 2 * sizeof *both);
    if (!both) {
        tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory to agree on channels");
        return;
    }
    tpr_wire_agree *theirs = &both[0], *ours = &both[1];
    bool good = tpr_wire_read_agree(body, size, theirs) && pipe->state == TPR_PIPE_AGREEING;
    bool first = good && !pipe->connector && pipe->channel_count == 0 && theirs->step == 1 && !pipe->agreed_step;
    uint32_t expected = pipe->connector ? (pipe->agreed_step ? 4u : 2u) : (pipe->agreed_step ? 3u : 1u);
    good = good && theirs->step == expected && (first || theirs->count == pipe->channel_count);
    if (!good) {
        tpr_pipe_end(pipe, TPRPC_ERROR_PROTOCOL, 0, "the peer's proof of channels is broken");
    } else {
        pipe->agreed_step = theirs->step;
        if (first) tpr_pipe_accept_channels(pipe, theirs, ours);
        ours->step = theirs->step + 1;
        ours->count = theirs->count;
        if (pipe->state != TPR_PIPE_ENDED) tpr_pipe_prove(pipe, theirs, ours);
        if (theirs->step < 4 && pipe->state != TPR_PIPE_ENDED) tpr_pipe_send_agree(pipe, ours);
        if (theirs->step >= 3 && pipe->state != TPR_PIPE_ENDED) tpr_pipe_open(pipe);
    }
    tpr_context_free(pipe->ctx, both, 2 * sizeof *both);
}

// The best transport not tried yet that is better than the one in use; NULL: stay.
static const tpr_context_backend *tpr_pipe_better(tprpc_pipe *pipe, uint32_t *index) {
    const tpr_context_backend *best = NULL;
    for (uint32_t i = 0; i < pipe->ctx->backend_count; i++) {
        const tpr_context_backend *entry = &pipe->ctx->backends[i];
        if (!entry->backend->transport || !(pipe->reached & 1u << i) || (pipe->tried & 1u << i)) continue;
        if (entry->priority <= (best ? best->priority : pipe->now.entry->priority)) continue;
        const tpr_wire_offer *offer = tpr_pipe_offer(pipe, entry);
        if (!offer || !offer->address[0]) continue;
        best = entry;
        *index = i;
    }
    return best;
}

static void tpr_pipe_move(tprpc_pipe *pipe);

TPR_COLD static void tpr_pipe_move_failed(tprpc_pipe *pipe, const char *why) {
    snprintf(pipe->move_why, sizeof pipe->move_why, "%.109s", why);
    TPR_LOG(&pipe->ctx->env.logger, TPRPC_LOG_INFO, "pipe", "", "the pipe stays: %s", why);
    tpr_pipe_disconnect(&pipe->next, TPRPC_ERROR_CANCELLED);
    if (pipe->old_lost) tpr_pipe_end(pipe, TPRPC_ERROR_PEER, 0, "the peer closed while the pipe was moved: %s", why);
    else tpr_pipe_move(pipe);
}

// Tries the next better transport, or goes on with the one in use.
TPR_COLD static void tpr_pipe_move(tprpc_pipe *pipe) {
    uint32_t index = 0;
    tprpc_error error = TPR_ZERO;
    const tpr_context_backend *entry = tpr_pipe_better(pipe, &index);
    if (!entry) {
        tpr_pipe_set_timer(pipe, TPR_PIPE_HANDSHAKE_MS);
        tpr_pipe_agree(pipe);
        return;
    }
    pipe->state = TPR_PIPE_MOVING;
    pipe->moved_have = 0;
    pipe->tried |= 1u << index;
    pipe->next.entry = entry;
    tpr_pipe_set_timer(pipe, TPR_PIPE_MOVE_MS);
    if (entry->backend->transport->connect(entry->instances[pipe->loop->index], tpr_pipe_offer(pipe, entry)->address, 0,
                                           &pipe->next.owner, &pipe->next.conn, &error) == TPRPC_OK) return;
    pipe->next.conn = NULL;
    tpr_pipe_move_failed(pipe, error.text);
}

// A peer on this host may die while a forked child of its holds the connection, which then does not tell. What it sent
// before it ended is still read, however long that takes: the pipe ends once nothing has come for a while.
static void tpr_pipe_process_ended(tpr_process_watch *watch) {
    tprpc_pipe *pipe = TPR_CONTAINER(watch, tprpc_pipe, process);
    pipe->orphaned = true;
    tpr_pipe_set_timer(pipe, TPR_PIPE_MOURN_MS);
}

static void tpr_pipe_watch_process(tprpc_pipe *pipe, uint64_t space, uint32_t process) {
    if (!space || space != pipe->ctx->process_space || pipe->state == TPR_PIPE_ENDED) return;
    if (!tpr_process_start(&pipe->loop->processes, (int32_t)process, &pipe->process))
        tpr_pipe_process_ended(&pipe->process);
}

TPR_COLD static void tpr_pipe_on_hello(tprpc_pipe *pipe, const uint8_t *body, size_t size) {
    tprpc_error error = TPR_ZERO;
    char peer[96];
    tpr_pipe_peer(pipe, peer, sizeof peer);
    if (pipe->state != TPR_PIPE_GREETING || pipe->hello) {
        tpr_pipe_end(pipe, TPRPC_ERROR_PROTOCOL, 0, "%s said hello twice", peer);
        return;
    }
    pipe->hello = (tpr_wire_hello *)tpr_context_alloc(pipe->ctx, sizeof *pipe->hello);
    if (!pipe->hello) {
        tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory for the peer's hello");
    } else if (!tpr_wire_read_hello(body, size, pipe->hello)) {
        tpr_pipe_end(pipe, TPRPC_ERROR_PROTOCOL, 0, "%s does not speak tprpc", peer);
    } else if (tpr_pipe_table(&pipe->now)->check_peer(pipe->now.conn, &error) != TPRPC_OK &&
               (error.status == TPRPC_ERROR_DENIED || !pipe->insecure)) {
        tpr_pipe_end(pipe, error.status, error.os_code, "%s", error.text);
    } else {
        if (!pipe->connector) tpr_pipe_send_hello(pipe);
        if (pipe->hello && pipe->state != TPR_PIPE_ENDED && pipe->hello->major != TPR_WIRE_MAJOR)
            tpr_pipe_end(pipe, TPRPC_ERROR_PROTOCOL, 0, "%s speaks wire version %u.%u, this end %d.%d", peer,
                         (unsigned)pipe->hello->major, (unsigned)pipe->hello->minor, TPR_WIRE_MAJOR, TPR_WIRE_MINOR);
        if (pipe->state == TPR_PIPE_ENDED) return;
        if (pipe->hello->message_bytes < pipe->message_bytes) pipe->message_bytes = pipe->hello->message_bytes;
        if (pipe->hello->metadata_bytes < pipe->metadata_bytes) pipe->metadata_bytes = pipe->hello->metadata_bytes;
        if (pipe->hello->tensors < pipe->tensors) pipe->tensors = pipe->hello->tensors;
        pipe->peer_minor = pipe->hello->minor;
        memcpy(pipe->peer_token, pipe->hello->token, sizeof pipe->peer_token);
        tpr_pipe_compare(pipe);
        if (!(tpr_pipe_table(&pipe->now)->flags & TPRPC_TRANSPORT_SAME_HOST))   // which watches it itself
            tpr_pipe_watch_process(pipe, pipe->hello->space, pipe->hello->process);
        if (pipe->connector) tpr_pipe_move(pipe);
        else pipe->state = TPR_PIPE_AGREEING;
    }
}

// The move's new connection, at the connector: established, then the peer's word with the right nonce.
static void tpr_pipe_next_event(tprpc_pipe *pipe, uint32_t events, const tprpc_error *error) {
    uint8_t frame[TPR_WIRE_HEADER + 36];
    tpr_wire_frame header;
    tpr_wire_move move;
    tprpc_span span;
    if (events & TPRPC_EVENT_OPEN) {
        tpr_wire_writer w = tpr_wire_writer_of(frame + TPR_WIRE_HEADER, sizeof frame - TPR_WIRE_HEADER);
        memcpy(move.token, pipe->peer_token, 16);
        memcpy(move.nonce, pipe->nonce, 16);
        tpr_wire_write_move(&w, &move);
        tpr_wire_put_frame(frame, 36, TPR_WIRE_MOVE, 0, 0);
        span.data = frame;
        span.size = sizeof frame;
        if (tpr_pipe_table(&pipe->next)->send(pipe->next.conn, &span, 1, NULL, 0, false) != sizeof frame) {
            tpr_pipe_move_failed(pipe, "the new connection took no bytes");
            return;
        }
    }
    if (events & TPRPC_EVENT_RECV) {
        span.data = pipe->moved + pipe->moved_have;
        span.size = sizeof pipe->moved - pipe->moved_have;
        pipe->moved_have += (uint32_t)tpr_pipe_table(&pipe->next)->recv(pipe->next.conn, &span, 1);
        if (pipe->moved_have == sizeof pipe->moved) {
            const uint8_t *body = pipe->moved + TPR_WIRE_HEADER;
            if (!tpr_wire_get_frame(pipe->moved, 0, &header) || header.kind != TPR_WIRE_MOVED ||
                !tpr_wire_read_move(body, 36, &move) || memcmp(move.nonce, pipe->nonce, 16) != 0) {
                tpr_pipe_move_failed(pipe, "the new connection's peer did not prove itself");
                return;
            }
            snprintf(pipe->address, sizeof pipe->address, "%s://%s", pipe->next.entry->backend->name,
                     tpr_pipe_offer(pipe, pipe->next.entry)->address);
            tpr_pipe_take_conn(pipe, pipe->next.entry, pipe->next.conn);
            pipe->next.conn = NULL;
            tpr_pipe_set_timer(pipe, TPR_PIPE_HANDSHAKE_MS);
            tpr_pipe_agree(pipe);
            return;
        }
    }
    if (events & TPRPC_EVENT_LOST) tpr_pipe_move_failed(pipe, error ? error->text : "the new connection was lost");
}

// ---- lanes: connections beside the pipe's own
//
// Large bulk goes over lanes where the transport is worth having them, so that small messages do not wait for what one
// connection holds. Who connected the pipe connects them, when a tensor first wants one or the other end says WANT;
// what is under way meanwhile goes over the pipe's own connection, as do all tensors where there are none.
//
// The ends need not see at the same time that a lane ended, nor whether what was sent had come. So each that closes one
// says LOST on the pipe's own connection, with the bytes that it sent over it, before anything that is asked for later;
// and who has received fewer gives up what it was receiving when it closed its end. Only then may the lane be made
// anew.

// Whether anything is being received that a lane may carry.
static bool tpr_pipe_receives_large(const tprpc_pipe *pipe) {
    for (const tpr_base_list *i = pipe->transfers.next; i != &pipe->transfers; i = i->next)
        if (TPR_CONTAINER(i, tpr_pipe_transfer, node)->large) return true;
    return false;
}

// A frame about a lane, whole. Returns its size.
static size_t tpr_pipe_put_lane(const tpr_pipe_lane *lane, uint8_t kind, uint8_t *out) {
    tpr_wire_writer w = tpr_wire_writer_of(out + TPR_WIRE_HEADER, TPR_WIRE_LANE_BYTES);
    tpr_wire_lane word;
    memcpy(word.move.token, lane->conn.pipe->peer_token, 16);
    memcpy(word.move.nonce, lane->nonce, 16);
    word.number = lane->number;
    word.sent = lane->conn.bulk_sent;
    tpr_wire_put_frame(out, TPR_WIRE_LANE_BYTES, kind, 0, 0);
    tpr_wire_write_lane(&w, &word);
    return TPR_WIRE_HEADER + TPR_WIRE_LANE_BYTES;
}

static void tpr_pipe_say_lost(const tpr_pipe_lane *lane) {
    uint8_t frame[TPR_WIRE_HEADER + TPR_WIRE_LANE_BYTES];
    tpr_pipe_put_lane(lane, TPR_WIRE_LOST, frame);
    tpr_pipe_control(lane->conn.pipe, TPR_WIRE_LOST, 0, frame + TPR_WIRE_HEADER, TPR_WIRE_LANE_BYTES, NULL, 0);
}

// Closes a lane, whatever became of it; its chunk is over.
static void tpr_pipe_lane_close(tpr_pipe_lane *lane, tprpc_status cause) {
    tprpc_pipe *pipe = lane->conn.pipe;
    pipe->lanes_open &= ~(1u << (lane->number - 1));
    tpr_timer_cancel(&pipe->loop->wheel, &lane->timer);
    tpr_pipe_disconnect(&lane->conn, cause);
    tpr_pipe_frame_over(&lane->conn);
    if (lane->conn.chunk_size && pipe->state != TPR_PIPE_ENDED) tpr_pipe_chunk_over(&lane->conn);
    lane->conn.chunk_size = 0;         // of a pipe that has ended all bulk is given back
}

static void tpr_pipe_lanes_end(tprpc_pipe *pipe, tprpc_status cause) {
    for (uint32_t i = 0; i < TPR_CONTEXT_LANES; i++) {
        if (!pipe->lanes[i]) continue;
        pipe->lanes[i]->state = TPR_PIPE_LANE_NONE;
        tpr_pipe_lane_close(pipe->lanes[i], cause);
    }
    tpr_base_list_remove(&pipe->home_node);
    if (pipe->home) tpr_base_map_remove(&pipe->home->by_token, tpr_base_load_le64(pipe->token));
    pipe->home = NULL;
}

// The pipe's end, after what its lanes still bring: they end when the peer has closed them.
TPR_COLD static void tpr_pipe_part(tprpc_pipe *pipe, tprpc_status status, int32_t os_code, const char *text) {
    if (!pipe->parting && pipe->lanes_open && tpr_pipe_receives_large(pipe)) {
        pipe->parting = true;
        tprpc_error_set(&pipe->error, status, os_code, "%s", text);
        tpr_pipe_set_timer(pipe, TPR_PIPE_HANDSHAKE_MS);
    } else if (!pipe->parting) {
        tpr_pipe_end(pipe, status, os_code, "%s", text);
    }
}

// What its lanes brought has come, or nothing more comes.
TPR_COLD static void tpr_pipe_parted(tprpc_pipe *pipe) {
    const tprpc_error why = pipe->error;
    tpr_pipe_end(pipe, why.status, why.os_code, "%s", why.text);
}

// A lane did not come to be, or ended.
TPR_COLD static void tpr_pipe_lane_ended(tpr_pipe_lane *lane, const char *why) {
    tprpc_pipe *pipe = lane->conn.pipe;
    const tpr_pipe_lane_state was = lane->state;
    snprintf(pipe->lane_why, sizeof pipe->lane_why, "lane %u: %.99s", (unsigned)lane->number, why);
    if (was != TPR_PIPE_LANE_OPEN) {
        TPR_LOG(&pipe->ctx->env.logger, TPRPC_LOG_INFO, "pipe", "", "no %s", pipe->lane_why);
        const uint32_t doubled = pipe->lanes_failed < 6 ? pipe->lanes_failed : 6;
        pipe->lanes_failed++;
        pipe->lanes_retry_us = tpr_loop_clock(pipe->loop) + ((int64_t)TPR_PIPE_LANE_RETRY_US << doubled);
    }
    lane->until = pipe->receives;
    lane->state = was == TPR_PIPE_LANE_CONNECTING ? TPR_PIPE_LANE_NONE : TPR_PIPE_LANE_ENDED;
    if (lane->state == TPR_PIPE_LANE_ENDED && !pipe->parting) tpr_pipe_say_lost(lane);
    tpr_pipe_lane_close(lane, was == TPR_PIPE_LANE_OPEN ? TPRPC_OK : TPRPC_ERROR_CANCELLED);
    if (pipe->parting && !pipe->lanes_open) tpr_pipe_parted(pipe);
    tpr_pipe_resume_later(pipe);       // bulk that waited for it
}

// Reads what came before it ended, but not all that a peer may still write to memory that both share.
TPR_COLD static void tpr_pipe_lane_drain(tpr_pipe_lane *lane) {
    const tprpc_pipe *pipe = lane->conn.pipe;
    const uint64_t stop = pipe->bytes_received + TPR_PIPE_DRAIN;
    while (lane->state == TPR_PIPE_LANE_OPEN && pipe->bytes_received < stop &&
           tpr_pipe_table(&lane->conn)->peek(lane->conn.conn).size) {
        const uint64_t before = pipe->bytes_received;
        tpr_pipe_lane_pump_in(lane);
        if (pipe->bytes_received == before) break;
    }
}

// Both ends have said that a lane ended. Where not all came of what was sent over it, what was being received then will
// not be whole.
TPR_COLD static void tpr_pipe_lane_settle(tpr_pipe_lane *lane, uint64_t sent) {
    tprpc_pipe *pipe = lane->conn.pipe;
    tpr_base_list *node = pipe->transfers.next;
    lane->state = TPR_PIPE_LANE_NONE;
    if (sent <= lane->conn.bulk_received) return;
    while (node != &pipe->transfers && pipe->state != TPR_PIPE_ENDED) {
        tpr_pipe_transfer *transfer = TPR_CONTAINER(node, tpr_pipe_transfer, node);
        node = node->next;
        if (!transfer->large || transfer->torn || transfer->place >= lane->until) continue;
        transfer->torn = true;         // it ends with lane_why
        tpr_pipe_abort(transfer, false);
        node = pipe->transfers.next;   // it may have ended others
    }
}

static void tpr_pipe_lane_opened(tpr_pipe_lane *lane) {
    tprpc_pipe *pipe = lane->conn.pipe;
    tpr_timer_cancel(&pipe->loop->wheel, &lane->timer);
    lane->state = TPR_PIPE_LANE_OPEN;
    pipe->lanes_open |= 1u << (lane->number - 1);
    pipe->lanes_failed = 0;
    tpr_pipe_resume_later(pipe);
}

// Says a word over a lane that has carried nothing yet. False: it ended.
static bool tpr_pipe_lane_say(tpr_pipe_lane *lane, uint8_t kind) {
    uint8_t frame[TPR_WIRE_HEADER + TPR_WIRE_LANE_BYTES];
    tprpc_span span;
    span.data = frame;
    span.size = tpr_pipe_put_lane(lane, kind, frame);
    if (tpr_pipe_table(&lane->conn)->send(lane->conn.conn, &span, 1, NULL, 0, false) == sizeof frame) return true;
    tpr_pipe_lane_ended(lane, "it took no bytes");
    return false;
}

// The connector's lane is established: it is asked for.
static void tpr_pipe_lane_ask(tpr_pipe_lane *lane) {
    if (!tpr_pipe_lane_say(lane, TPR_WIRE_LANE)) return;
    lane->conn.bulk_sent = lane->conn.bulk_received = 0;
    lane->state = TPR_PIPE_LANE_ASKED;
}

// The answer, from who knows the token that this end told the pipe's peer alone. Who listened sends nothing before the
// connector has answered, too: so one that comes too late for him has carried nothing.
static void tpr_pipe_lane_answered(tpr_pipe_lane *lane) {
    tpr_pipe_conn *conn = &lane->conn;
    tprpc_error error = TPR_ZERO;
    tpr_wire_lane word;
    conn->body_have +=
        (uint32_t)tpr_pipe_recv(conn, lane->answer + conn->body_have, sizeof lane->answer - conn->body_have);
    if (conn->body_have < sizeof lane->answer) return;
    conn->body_have = 0;
    if (!tpr_wire_get_frame(lane->answer, 0, &conn->frame) || conn->frame.kind != TPR_WIRE_LANED ||
        conn->frame.size != TPR_WIRE_LANE_BYTES ||
        !tpr_wire_read_lane(lane->answer + TPR_WIRE_HEADER, TPR_WIRE_LANE_BYTES, &word) ||
        word.number != lane->number || memcmp(word.move.nonce, lane->nonce, 16) != 0 ||
        memcmp(word.move.token, conn->pipe->token, 16) != 0) {
        tpr_pipe_lane_ended(lane, "its peer did not prove itself");
    } else if (tpr_pipe_table(conn)->check_peer(conn->conn, &error) == TPRPC_ERROR_DENIED) {
        tpr_pipe_lane_ended(lane, error.text);
    } else if (!conn->pipe->connector || tpr_pipe_lane_say(lane, TPR_WIRE_LANED)) {
        tpr_pipe_lane_opened(lane);
    }
}

static void tpr_pipe_lane_event(tpr_pipe_lane *lane, uint32_t events, const tprpc_error *error) {
    if ((events & TPRPC_EVENT_OPEN) && lane->state == TPR_PIPE_LANE_CONNECTING) tpr_pipe_lane_ask(lane);
    if ((events & TPRPC_EVENT_RECV) && lane->state == TPR_PIPE_LANE_ASKED) tpr_pipe_lane_answered(lane);
    if (events & TPRPC_EVENT_RECV) tpr_pipe_lane_pump_in(lane);
    if (events & TPRPC_EVENT_SEND) tpr_pipe_lane_pump_out(lane);
    if (!(events & TPRPC_EVENT_LOST) || !lane->conn.conn) return;
    tpr_pipe_lane_drain(lane);
    if (lane->conn.conn) tpr_pipe_lane_ended(lane, error ? error->text : "the connection was lost");
}

static void tpr_pipe_lane_timed_out(tprpc_work *work) {
    tpr_pipe_lane *lane = TPR_CONTAINER(work, tpr_pipe_lane, timer);
    tprpc_pipe *pipe = lane->conn.pipe;
    pipe->refs++;
    tpr_pipe_lane_ended(lane, "it did not come in time");
    tpr_pipe_unref(pipe);
}

// The lane of that number, made when it is first asked for; NULL: no memory.
static tpr_pipe_lane *tpr_pipe_lane_of(tprpc_pipe *pipe, uint32_t number) {
    tpr_pipe_lane **at = &pipe->lanes[number - 1], *lane = *at;
    if (lane) return lane;
    lane = *at = (tpr_pipe_lane *)tpr_context_alloc(pipe->ctx, sizeof *lane);
    if (!lane) return NULL;
    lane->conn.owner.event = tpr_pipe_conn_event;
    lane->conn.pipe = pipe;
    lane->number = number;
    lane->timer.run = tpr_pipe_lane_timed_out;
    lane->timer.loop = pipe->loop->index;
    return lane;
}

// The other end says that a lane has ended. One that has not come here yet is not to come any more.
TPR_COLD static bool tpr_pipe_on_lost(tprpc_pipe *pipe, const uint8_t *body, size_t size) {
    tpr_wire_lane word;
    if (!tpr_wire_read_lane(body, size, &word) || word.number == 0 || word.number > TPR_CONTEXT_LANES)
        return false;
    tpr_pipe_lane *lane = tpr_pipe_lane_of(pipe, word.number);
    if (!lane) {
        tpr_pipe_end(pipe, TPRPC_ERROR_MEMORY, 0, "no memory for a lane");
        return true;
    }
    const bool known = memcmp(lane->nonce, word.move.nonce, 16) == 0;
    if (!pipe->connector && lane->state == TPR_PIPE_LANE_NONE) {
        memcpy(lane->nonce, word.move.nonce, 16);
        lane->conn.bulk_sent = lane->conn.bulk_received = 0;
        tpr_pipe_say_lost(lane);
    }
    if (!known || lane->state == TPR_PIPE_LANE_NONE) return true;
    tpr_pipe_lane_drain(lane);
    if (lane->state == TPR_PIPE_LANE_ASKED || lane->state == TPR_PIPE_LANE_OPEN)
        tpr_pipe_lane_ended(lane, "the other end lost it");
    if (lane->state == TPR_PIPE_LANE_ENDED) tpr_pipe_lane_settle(lane, word.sent);
    return true;
}

static void tpr_pipe_lane_connect(tprpc_pipe *pipe, uint32_t number) {
    const tprpc_transport_table *table = tpr_pipe_table(&pipe->now);
    char name[16], peer[TPR_WIRE_ADDRESS];
    const char *address = tpr_transport_split(pipe->address, name);
    tprpc_error error = TPR_ZERO;
    tpr_pipe_lane *lane = tpr_pipe_lane_of(pipe, number);
    if (!lane || lane->state != TPR_PIPE_LANE_NONE) return;
    if (table->flags & TPRPC_TRANSPORT_HOST_PORT) {   // by number: a name would have to be looked up, which may block
        table->peer(pipe->now.conn, peer, sizeof peer);
        address = peer;
    }
    memcpy(lane->nonce, pipe->nonce, sizeof lane->nonce);
    tpr_base_store_le64(lane->nonce, tpr_base_load_le64(pipe->nonce) + ++pipe->lanes_made);
    lane->state = TPR_PIPE_LANE_CONNECTING;
    lane->conn.entry = pipe->now.entry;
    tpr_loop_timer(pipe->loop, &lane->timer, tpr_loop_clock(pipe->loop) + TPR_PIPE_LANE_MS * 1000);
    if (table->connect(pipe->now.entry->instances[pipe->loop->index], address, number, &lane->conn.owner,
                       &lane->conn.conn, &error) == TPRPC_OK) return;
    lane->conn.conn = NULL;
    tpr_pipe_lane_ended(lane, error.text);
}

// A channel here, or the other end, would like to have so many lanes.
static void tpr_pipe_lanes_want(tprpc_pipe *pipe, uint32_t count) {
    uint8_t body[4];
    if (count > pipe->ctx->lanes) count = pipe->ctx->lanes;
    const uint32_t all = (1u << count) - 1;
    pipe->lanes_wanted |= all;
    if (pipe->state != TPR_PIPE_OPEN || tpr_pipe_lanes_open(pipe, count) == all || pipe->peer_minor < 2 ||
        pipe->parting || !(tpr_pipe_table(&pipe->now)->flags & TPRPC_TRANSPORT_LANES) ||
        (pipe->lanes_retry_us && tpr_loop_clock(pipe->loop) < pipe->lanes_retry_us)) return;
    pipe->lanes_retry_us = pipe->loop->now_us + TPR_PIPE_LANE_RETRY_US;   // an answer is awaited so long
    if (!pipe->connector) {
        tpr_base_store_le32(body, count);
        tpr_pipe_control(pipe, TPR_WIRE_WANT, 0, body, sizeof body, NULL, 0);
        return;
    }
    for (uint32_t number = 1; number <= count && pipe->state == TPR_PIPE_OPEN; number++)
        tpr_pipe_lane_connect(pipe, number);
}

static void tpr_pipe_conn_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    tpr_pipe_conn *conn = (tpr_pipe_conn *)(void *)owner;
    tprpc_pipe *pipe = conn->pipe;
    if (TPR_LIKELY(events == TPRPC_EVENT_RECV && conn == &pipe->now)) {
        tpr_pipe_pump_in(pipe);
        return;
    }
    pipe->refs++;
    if (conn == &pipe->next) {
        tpr_pipe_next_event(pipe, events, error);
    } else if (conn != &pipe->now) {
        tpr_pipe_lane_event((tpr_pipe_lane *)(void *)conn, events, error);
    } else {
        if ((events & TPRPC_EVENT_OPEN) && pipe->state == TPR_PIPE_CONNECTING) {
            pipe->state = TPR_PIPE_GREETING;
            tpr_pipe_send_hello(pipe);
        }
        if (events & TPRPC_EVENT_RECV) tpr_pipe_pump_in(pipe);
        if (events & TPRPC_EVENT_SEND) tpr_pipe_pump_out(pipe);
        if ((events & TPRPC_EVENT_LOST) && pipe->state == TPR_PIPE_MOVING) {
            pipe->old_lost = true;     // the peer has moved already, or is gone: the new connection will tell
        } else if (events & TPRPC_EVENT_LOST) {
            while (pipe->state != TPR_PIPE_ENDED && tpr_pipe_table(&pipe->now)->peek(pipe->now.conn).size) {
                uint64_t before = pipe->bytes_received;   // what came before is still read
                tpr_pipe_pump_in(pipe);
                if (pipe->bytes_received == before) break;
            }
            tpr_pipe_part(pipe, error ? error->status : TPRPC_ERROR_PEER, error ? error->os_code : 0,
                          error ? error->text : "the connection was lost");
        }
    }
    tpr_pipe_unref(pipe);
}

// Makes a connection the pipe's, in place of the one it has.
TPR_COLD static void tpr_pipe_take_conn(tprpc_pipe *pipe, const tpr_context_backend *entry, void *conn) {
    tpr_pipe_disconnect(&pipe->now, TPRPC_OK);
    pipe->now.entry = entry;
    pipe->now.conn = conn;
    entry->backend->transport->own(conn, &pipe->now.owner);
}

TPR_COLD static void tpr_pipe_set_timer(tprpc_pipe *pipe, int64_t ms) {
    pipe->heard = pipe->bytes_received;
    if (pipe->orphaned) ms = TPR_PIPE_MOURN_MS;
    tpr_timer_cancel(&pipe->loop->wheel, &pipe->timer);
    tpr_loop_timer(pipe->loop, &pipe->timer, tpr_loop_clock(pipe->loop) + ms * 1000);
}

TPR_COLD static void tpr_pipe_timed_out(tprpc_work *work) {
    tprpc_pipe *pipe = TPR_CONTAINER(work, tprpc_pipe, timer);
    char peer[96];
    pipe->refs++;
    tpr_pipe_peer(pipe, peer, sizeof peer);
    if (pipe->orphaned && pipe->bytes_received != pipe->heard) tpr_pipe_set_timer(pipe, TPR_PIPE_MOURN_MS);
    else if (pipe->orphaned) tpr_pipe_end(pipe, TPRPC_ERROR_PEER, 0, "%s: its process died", peer);
    else if (pipe->parting && pipe->bytes_received != pipe->heard) tpr_pipe_set_timer(pipe, TPR_PIPE_HANDSHAKE_MS);
    else if (pipe->parting) tpr_pipe_parted(pipe);
    else if (pipe->state == TPR_PIPE_MOVING) tpr_pipe_move_failed(pipe, "the better transport did not answer in time");
    else
        tpr_pipe_end(pipe, TPRPC_ERROR_TIMEOUT, 0,
                     pipe->state == TPR_PIPE_CONNECTING ? "connecting to %s%s timed out"
                                                        : "%s%s did not agree on a pipe in time",
                     pipe->state == TPR_PIPE_CONNECTING ? pipe->address : "", peer);
    tpr_pipe_unref(pipe);
}

// ---- listeners

TPR_COLD static void tpr_pipe_greeting_end(tpr_pipe_greeting *greeting, tprpc_status cause) {
    tprpc_listener *listener = greeting->listener;
    tpr_timer_cancel(&listener->loop->wheel, &greeting->timer);
    tpr_base_list_remove(&greeting->node);
    if (greeting->conn) greeting->entry->backend->transport->disconnect(greeting->conn, cause);
    tpr_context_free(listener->ctx, greeting, sizeof *greeting);
    listener->greetings--;
    tpr_pipe_listener_unref(listener);
}

static void tpr_pipe_listener_unref(tprpc_listener *listener) {
    if (--listener->refs) return;
    tpr_base_list_remove(&listener->object.node);
    tpr_base_map_clear(&listener->by_token);
    tpr_context_free(listener->ctx, listener, sizeof *listener);
}

// A pipe that came in was refused or is lost before it was handed over.
TPR_COLD static void tpr_pipe_listener_lost(tprpc_pipe *pipe) {
    tprpc_listener *listener = pipe->listener;
    if (pipe->handed) return;          // it waits to be accepted, and may hold messages
    pipe->listener = NULL;
    tpr_base_list_remove(&pipe->listener_node);
    pipe->closed = true;
    listener->greetings--;
    tpr_pipe_listener_unref(listener);
}

static void tpr_pipe_listener_match(tprpc_listener *listener) {
    while (!tpr_base_list_empty(&listener->ready) && !tpr_base_list_empty(&listener->accepts)) {
        tprpc_pipe *pipe = TPR_CONTAINER(listener->ready.next, tprpc_pipe, listener_node);
        tpr_pipe_op *op = TPR_CONTAINER(listener->accepts.next, tpr_pipe_op, node);
        tpr_base_list_remove(&pipe->listener_node);
        tpr_base_list_remove(&op->node);
        pipe->listener = NULL;
        pipe->refs++;
        listener->greetings--;
        tpr_pipe_listener_unref(listener);   // the pipe's; the operation holds another
        op->pipe = pipe;
        tpr_loop_post(listener->loop, &op->task);
    }
}

TPR_COLD static void tpr_pipe_listener_open(tprpc_pipe *pipe) {
    tprpc_listener *listener = pipe->listener;
    tpr_base_list_remove(&pipe->listener_node);
    if (tpr_base_map_put(&listener->by_token, tpr_base_load_le64(pipe->token), pipe)) {
        pipe->home = listener;
        tpr_base_list_add(&listener->members, &pipe->home_node);
    }                                  // else it goes without lanes
    if (listener->user_for) {
        pipe->listener = NULL;
        pipe->user = listener->user_for(listener->user_arg, pipe);
        listener->greetings--;
        if (!pipe->user) tpr_pipe_drop(pipe);
        tpr_pipe_listener_unref(listener);
        return;
    }
    pipe->handed = true;
    tpr_base_list_add(&listener->ready, &pipe->listener_node);
    tpr_pipe_listener_match(listener);
}

// The first frame said hello: from here on it is a pipe, though nobody's yet.
TPR_COLD static void tpr_pipe_greeting_hello(tpr_pipe_greeting *greeting, size_t size) {
    tprpc_listener *listener = greeting->listener;
    tprpc_error error = TPR_ZERO;
    tprpc_pipe *pipe = tpr_pipe_new(listener->ctx, listener->loop, false, listener->ordered, &error);
    if (!pipe) {
        TPR_LOG(&listener->ctx->env.logger, TPRPC_LOG_WARNING, "pipe", "", "an incoming connection was refused: %s",
                error.text);
        tpr_pipe_greeting_end(greeting, TPRPC_ERROR_LIMIT);
        return;
    }
    pipe->listener = listener;
    pipe->insecure = listener->insecure;
    listener->refs++;
    listener->greetings++;
    tpr_base_list_add(&listener->pipes, &pipe->listener_node);
    tpr_pipe_take_conn(pipe, greeting->entry, greeting->conn);
    greeting->conn = NULL;
    pipe->state = TPR_PIPE_GREETING;
    tpr_pipe_set_timer(pipe, TPR_PIPE_HANDSHAKE_MS);
    pipe->refs++;
    pipe->bytes_received = TPR_WIRE_HEADER + size;
    tpr_pipe_on_hello(pipe, greeting->bytes + TPR_WIRE_HEADER, size);
    if (pipe->state != TPR_PIPE_ENDED) tpr_pipe_resume_later(pipe);   // what came behind the hello has had its event
    tpr_pipe_greeting_end(greeting, TPRPC_OK);
    tpr_pipe_unref(pipe);
}

// The first frame said that this connection carries a pipe from here on.
TPR_COLD static void tpr_pipe_greeting_move(tpr_pipe_greeting *greeting, size_t size) {
    tprpc_listener *listener = greeting->listener;
    const tprpc_transport_table *table = greeting->entry->backend->transport;
    tpr_wire_move move;
    tprpc_pipe *pipe = NULL;
    uint8_t frame[TPR_WIRE_HEADER + 36];
    tpr_wire_writer w = tpr_wire_writer_of(frame + TPR_WIRE_HEADER, 36);
    tprpc_span span;
    bool good = tpr_wire_read_move(greeting->bytes + TPR_WIRE_HEADER, size, &move);
    for (tpr_base_list *i = listener->pipes.next; good && i != &listener->pipes && !pipe; i = i->next) {
        tprpc_pipe *candidate = TPR_CONTAINER(i, tprpc_pipe, listener_node);
        if (candidate->state == TPR_PIPE_AGREEING && !candidate->agreed_step &&
            memcmp(candidate->token, move.token, 16) == 0)
            pipe = candidate;
    }
    if (!pipe || table->check_peer(greeting->conn, NULL) == TPRPC_ERROR_DENIED) {
        tpr_pipe_greeting_end(greeting, TPRPC_ERROR_DENIED);
        return;
    }
    tpr_wire_write_move(&w, &move);
    tpr_wire_put_frame(frame, 36, TPR_WIRE_MOVED, 0, 0);
    span.data = frame;
    span.size = sizeof frame;
    if (table->send(greeting->conn, &span, 1, NULL, 0, false) == sizeof frame) {
        tpr_pipe_take_conn(pipe, greeting->entry, greeting->conn);
        pipe->old_lost = false;
        greeting->conn = NULL;
    }
    tpr_pipe_greeting_end(greeting, TPRPC_ERROR_LIMIT);
}

// The pipe's lane that a connection says it is; NULL: it may not become one.
TPR_COLD static tpr_pipe_lane *tpr_pipe_greeting_lane_of(const tpr_pipe_greeting *greeting, size_t size,
                                                         tpr_wire_lane *word) {
    const tprpc_transport_table *table = greeting->entry->backend->transport;
    if (!tpr_wire_read_lane(greeting->bytes + TPR_WIRE_HEADER, size, word)) return NULL;
    tprpc_pipe *pipe =
        (tprpc_pipe *)tpr_base_map_get(&greeting->listener->by_token, tpr_base_load_le64(word->move.token));
    if (!pipe || memcmp(pipe->token, word->move.token, 16) != 0 || word->number == 0 ||
        word->number > pipe->ctx->lanes || pipe->now.entry != greeting->entry ||
        !(table->flags & TPRPC_TRANSPORT_LANES) || pipe->state != TPR_PIPE_OPEN || pipe->parting ||
        table->check_peer(greeting->conn, NULL) == TPRPC_ERROR_DENIED)
        return NULL;
    tpr_pipe_lane *lane = tpr_pipe_lane_of(pipe, word->number);
    return lane && memcmp(lane->nonce, word->move.nonce, 16) != 0 ? lane : NULL;
}

// The first frame said that this connection is a lane of a pipe that came in before. One that ended here has ended at
// the other end, too, whose word on it may be still to come.
TPR_COLD static void tpr_pipe_greeting_lane(tpr_pipe_greeting *greeting, size_t size) {
    const tprpc_transport_table *table = greeting->entry->backend->transport;
    uint8_t frame[TPR_WIRE_HEADER + TPR_WIRE_LANE_BYTES];
    tpr_wire_lane word;
    tprpc_span span;
    tpr_pipe_lane *lane = tpr_pipe_greeting_lane_of(greeting, size, &word);
    tprpc_pipe *pipe = lane ? lane->conn.pipe : NULL;
    if (pipe) pipe->refs++;
    if (pipe && lane->state == TPR_PIPE_LANE_ENDED) tpr_pipe_lane_settle(lane, word.sent);
    if (pipe && lane->state == TPR_PIPE_LANE_NONE && pipe->state == TPR_PIPE_OPEN) {
        memcpy(lane->nonce, word.move.nonce, 16);
        lane->conn.bulk_sent = lane->conn.bulk_received = 0;
        span.data = frame;
        span.size = tpr_pipe_put_lane(lane, TPR_WIRE_LANED, frame);
        if (table->send(greeting->conn, &span, 1, NULL, 0, false) == sizeof frame) {
            lane->conn.entry = greeting->entry;
            lane->conn.conn = greeting->conn;
            table->own(greeting->conn, &lane->conn.owner);
            greeting->conn = NULL;
            lane->state = TPR_PIPE_LANE_ASKED;
            tpr_loop_timer(pipe->loop, &lane->timer,
                           tpr_loop_clock(pipe->loop) + TPR_PIPE_HANDSHAKE_MS * INT64_C(1000));
        }
    }
    tpr_pipe_greeting_end(greeting, TPRPC_ERROR_DENIED);
    if (pipe) tpr_pipe_unref(pipe);
}

TPR_COLD static void tpr_pipe_greeting_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    tpr_pipe_greeting *greeting = (tpr_pipe_greeting *)(void *)owner;
    const tprpc_transport_table *table = greeting->entry->backend->transport;
    uint32_t want = TPR_WIRE_HEADER;
    tpr_wire_frame frame = TPR_ZERO;
    (void)error;
    for (; events & TPRPC_EVENT_RECV;) {
        tprpc_span span;
        if (greeting->have >= TPR_WIRE_HEADER) {
            bool good = tpr_wire_get_frame(greeting->bytes, 0, &frame) &&
                        (frame.kind == TPR_WIRE_HELLO || frame.kind == TPR_WIRE_MOVE || frame.kind == TPR_WIRE_LANE);
            if (!good) {
                TPR_LOG(&greeting->listener->ctx->env.logger, TPRPC_LOG_INFO, "pipe", "",
                        "a peer does not speak tprpc");
                tpr_pipe_greeting_end(greeting, TPRPC_ERROR_PROTOCOL);
                return;
            }
            want = TPR_WIRE_HEADER + frame.size;
        }
        if (greeting->have == want) {
            if (frame.kind == TPR_WIRE_HELLO) tpr_pipe_greeting_hello(greeting, frame.size);
            else if (frame.kind == TPR_WIRE_MOVE) tpr_pipe_greeting_move(greeting, frame.size);
            else tpr_pipe_greeting_lane(greeting, frame.size);
            return;
        }
        span.data = greeting->bytes + greeting->have;
        span.size = want - greeting->have;
        size_t n = table->recv(greeting->conn, &span, 1);
        if (!n) break;
        greeting->have += (uint32_t)n;
    }
    if (events & TPRPC_EVENT_LOST) tpr_pipe_greeting_end(greeting, TPRPC_ERROR_PEER);
}

TPR_COLD static void tpr_pipe_greeting_timed_out(tprpc_work *work) {
    tpr_pipe_greeting_end(TPR_CONTAINER(work, tpr_pipe_greeting, timer), TPRPC_ERROR_TIMEOUT);
}

// The one that has said nothing for longest goes, or else the pipe whose other end has said hello and then let it wait:
// who is silent keeps nobody out.
TPR_COLD static void tpr_pipe_make_room(tprpc_listener *listener) {
    const int64_t patient_us = TPR_PIPE_HANDSHAKE_MS * INT64_C(1000) - TPR_PIPE_PATIENCE_US;
    tprpc_pipe *oldest =
        tpr_base_list_empty(&listener->pipes) ? NULL : TPR_CONTAINER(listener->pipes.next, tprpc_pipe, listener_node);
    TPR_LOG(&listener->ctx->env.logger, TPRPC_LOG_WARNING, "pipe", "",
            "%u incoming connections are waiting: what is silent makes room", (unsigned)listener->greetings);
    if (!tpr_base_list_empty(&listener->greeting_list))
        tpr_pipe_greeting_end(TPR_CONTAINER(listener->greeting_list.next, tpr_pipe_greeting, node), TPRPC_ERROR_LIMIT);
    else if (oldest && oldest->timer.due_us - tpr_loop_clock(listener->loop) <= patient_us)
        tpr_pipe_end(oldest, TPRPC_ERROR_LIMIT, 0, "too many connections wait, and this one has been silent");
}

TPR_COLD static void tpr_pipe_accepted_conn(tprpc_listen_owner *owner, void *conn) {
    tpr_pipe_listen *address = (tpr_pipe_listen *)(void *)owner;
    tprpc_listener *listener = address->listener;
    const tprpc_transport_table *table = address->entry->backend->transport;
    tpr_pipe_greeting *greeting = NULL;
    if (listener->greetings >= listener->ctx->limits.handshakes) tpr_pipe_make_room(listener);
    if (listener->greetings < listener->ctx->limits.handshakes)
        greeting = (tpr_pipe_greeting *)tpr_context_alloc(listener->ctx, sizeof *greeting);
    if (!greeting) {
        TPR_LOG(&listener->ctx->env.logger, TPRPC_LOG_WARNING, "pipe", "",
                "an incoming connection was refused: %u are waiting", (unsigned)listener->greetings);
        table->disconnect(conn, TPRPC_ERROR_LIMIT);
        return;
    }
    greeting->owner.event = tpr_pipe_greeting_event;
    greeting->listener = listener;
    greeting->entry = address->entry;
    greeting->conn = conn;
    greeting->timer.run = tpr_pipe_greeting_timed_out;
    tpr_base_list_add(&listener->greeting_list, &greeting->node);
    listener->greetings++;
    listener->refs++;
    tpr_loop_timer(listener->loop, &greeting->timer, tpr_loop_clock(listener->loop) + TPR_PIPE_HANDSHAKE_MS * 1000);
    table->own(conn, &greeting->owner);
}

// Stops listening; what is under way ends. Under the lock.
TPR_COLD static void tpr_pipe_listener_drop(tprpc_listener *listener) {
    if (listener->closed) return;
    listener->closed = true;
    for (uint32_t i = 0; i < listener->count; i++)
        listener->addresses[i].entry->backend->transport->unlisten(listener->addresses[i].handle);
    while (!tpr_base_list_empty(&listener->members)) {   // who goes on without lanes to come
        tprpc_pipe *pipe = TPR_CONTAINER(listener->members.next, tprpc_pipe, home_node);
        tpr_base_list_remove(&pipe->home_node);
        pipe->home = NULL;
    }
    while (!tpr_base_list_empty(&listener->greeting_list))
        tpr_pipe_greeting_end(TPR_CONTAINER(listener->greeting_list.next, tpr_pipe_greeting, node), TPRPC_ERROR_CLOSED);
    while (!tpr_base_list_empty(&listener->ready)) {
        tprpc_pipe *pipe = TPR_CONTAINER(listener->ready.next, tprpc_pipe, listener_node);
        pipe->handed = false;
        pipe->refs++;
        if (pipe->state == TPR_PIPE_ENDED) tpr_pipe_listener_lost(pipe);
        else tpr_pipe_end(pipe, TPRPC_ERROR_CLOSED, 0, "the listener was closed");
        tpr_pipe_unref(pipe);
    }
    while (!tpr_base_list_empty(&listener->pipes))
        tpr_pipe_end(TPR_CONTAINER(listener->pipes.next, tprpc_pipe, listener_node), TPRPC_ERROR_CLOSED, 0,
                     "the listener was closed");
    while (!tpr_base_list_empty(&listener->accepts)) {
        tpr_pipe_op *op = TPR_CONTAINER(listener->accepts.next, tpr_pipe_op, node);
        tpr_base_list_remove(&op->node);
        op->status = tprpc_error_set(&op->error, TPRPC_ERROR_CLOSED, 0, "the listener was closed");
        tpr_loop_post(listener->loop, &op->task);
    }
    tpr_pipe_listener_unref(listener);
}

static void tpr_pipe_listener_object_close(tpr_loop_object *object) {
    tpr_pipe_listener_drop(TPR_CONTAINER(object, tprpc_listener, object));
}

static const tpr_context_backend *tpr_pipe_transport(tprpc_context *ctx, const char *name, tprpc_error *error) {
    for (uint32_t i = 0; i < ctx->backend_count; i++) {
        const tpr_context_backend *entry = &ctx->backends[i];
        if (!entry->backend->transport || strcmp(entry->backend->name, name) != 0) continue;
        if (entry->viable) return entry;
        tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "transport %s is not usable here: %s", name, entry->why);
        return NULL;
    }
    tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "there is no transport %s", name);
    return NULL;
}

// Splits and judges an address. Returns the transport, and what comes behind "://".
static const tpr_context_backend *tpr_pipe_address(tprpc_context *ctx, tpr_loop *loop, const char *address,
                                                   bool insecure, const char **rest, tprpc_error *error) {
    char name[16];
    *rest = tpr_transport_split(address, name);
    if (!*rest || strlen(address) >= TPR_WIRE_ADDRESS) {
        tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "\"%.60s\" is no address such as tcp://127.0.0.1:7000",
                        address ? address : "");
        return NULL;
    }
    const tpr_context_backend *entry = tpr_pipe_transport(ctx, name, error);
    if (!entry) return NULL;
    if (!insecure && entry->backend->transport->public_address(entry->instances[loop->index], *rest)) {
        tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                        "%s is not loopback: it needs a `secret` (which needs TLS, not in "
                        "this build) or `insecure`",
                        address);
        return NULL;
    }
    return entry;
}

TPR_COLD
static tprpc_status tpr_pipe_listen_on(tprpc_listener *listener, const tpr_context_backend *entry, const char *rest,
                                       bool given, tprpc_error *error) {
    tpr_pipe_listen *address = &listener->addresses[listener->count];
    const tprpc_transport_table *table = entry->backend->transport;
    char text[TPR_WIRE_ADDRESS];
    if (listener->count == TPR_PIPE_ADDRESSES)
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "a listener has at most %d addresses", TPR_PIPE_ADDRESSES);
    address->owner.accepted = tpr_pipe_accepted_conn;
    address->listener = listener;
    address->entry = entry;
    address->given = given;
    tprpc_status status =
        table->listen(entry->instances[listener->loop->index], rest, &address->owner, &address->handle, error);
    if (status != TPRPC_OK) return status;
    bool whole = table->address(address->handle, text, sizeof text) < sizeof text;
    int size = snprintf(address->address, sizeof address->address, "%s://%s", entry->backend->name, text);
    if (!whole || size >= TPR_WIRE_ADDRESS) {
        table->unlisten(address->handle);
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "an address of more than %d bytes: %.40s...",
                               TPR_WIRE_ADDRESS - 1, address->address);
    }
    listener->count++;
    return TPRPC_OK;
}

// Beside the addresses given, a listener has one of each better transport, for pipes to move to.
static void tpr_pipe_listen_beside(tprpc_listener *listener) {
    tprpc_context *ctx = listener->ctx;
    for (uint32_t i = 0; i < ctx->backend_count; i++) {
        const tpr_context_backend *entry = &ctx->backends[i];
        bool given = false, better = false;
        tprpc_error error = TPR_ZERO;
        if (!entry->viable || !entry->backend->transport) continue;
        for (uint32_t a = 0; a < listener->count; a++) {
            given |= listener->addresses[a].entry == entry;
            better |= listener->addresses[a].entry->priority < entry->priority;
        }
        if (given || !better) continue;
        if (tpr_pipe_listen_on(listener, entry, "", false, &error) != TPRPC_OK)
            TPR_LOG(&ctx->env.logger, TPRPC_LOG_INFO, "pipe", "", "pipes will not move to %s: %s", entry->backend->name,
                    error.text);
    }
}

// A listener for the public functions, or for an agent (user_for takes each pipe as it opens).
TPR_COLD
static tprpc_status tpr_pipe_listen_for(tprpc_context *ctx, const tprpc_listener_desc *desc, tpr_loop *loop,
                                        tpr_pipe_user *(*user_for)(void *, tprpc_pipe *), void *arg,
                                        tprpc_listener **out, tprpc_error *error) {
    tprpc_status status = TPRPC_OK;
    tpr_loop_enter(loop);
    tprpc_listener *listener = (tprpc_listener *)tpr_context_alloc(ctx, sizeof *listener);
    if (!listener) status = tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a listener");
    if (listener) {
        listener->loop = loop;
        listener->ctx = ctx;
        listener->ordered = desc->ordered;
        listener->insecure = desc->insecure;
        listener->refs = 1;
        listener->user_for = user_for;
        listener->user_arg = arg;
        listener->object.close = tpr_pipe_listener_object_close;
        tpr_base_list_init(&listener->greeting_list);
        tpr_base_list_init(&listener->pipes);
        tpr_base_list_init(&listener->ready);
        tpr_base_list_init(&listener->accepts);
        tpr_base_list_init(&listener->members);
        listener->by_token.memory = &ctx->env.memory;
        tpr_base_list_add(&loop->objects, &listener->object.node);
    }
    for (size_t i = 0; i < desc->address_count && status == TPRPC_OK; i++) {
        tprpc_error mine = TPR_ZERO;
        const char *rest = NULL;
        const tpr_context_backend *entry =
            tpr_pipe_address(ctx, loop, desc->addresses[i], desc->insecure, &rest, &mine);
        status = entry ? tpr_pipe_listen_on(listener, entry, rest, true, &mine) : mine.status;
        if (status != TPRPC_OK && error) *error = mine;
        bool more = listener->count || i + 1 < desc->address_count;
        if (status != TPRPC_OK && user_for && more && entry &&   // an agent does without what others can stand in for
            !(entry->backend->transport->flags & TPRPC_TRANSPORT_HOST_PORT)) {
            TPR_LOG(&ctx->env.logger, TPRPC_LOG_INFO, "pipe", "", "pipes will not come over %s: %s",
                    entry->backend->name, mine.text);
            status = TPRPC_OK;
        }
    }
    if (status == TPRPC_OK) tpr_pipe_listen_beside(listener);
    else if (listener) tpr_pipe_listener_drop(listener);
    tpr_loop_leave(loop);
    if (status == TPRPC_OK) *out = listener;
    return status;
}

// Begins to connect a new pipe to an address, under the lock. On an error the pipe is as before.
TPR_COLD static tprpc_status tpr_pipe_reach(tprpc_pipe *pipe, const tprpc_pipe_desc *desc, tprpc_error *error) {
    tpr_loop *loop = pipe->loop;
    const char *rest = NULL;
    const tpr_context_backend *entry = tpr_pipe_address(pipe->ctx, loop, desc->address, desc->insecure, &rest, error);
    if (!entry) return error->status;
    snprintf(pipe->address, sizeof pipe->address, "%s", desc->address);
    pipe->insecure = desc->insecure;
    pipe->now.entry = entry;
    tprpc_status status = entry->backend->transport->connect(entry->instances[loop->index], rest, 0, &pipe->now.owner,
                                                             &pipe->now.conn, error);
    if (status != TPRPC_OK) {
        pipe->now.conn = NULL;
        return status;
    }
    int64_t due = tpr_context_deadline(tpr_loop_clock(loop), tpr_context_time(desc->timeout_ms, TPR_PIPE_HANDSHAKE_MS));
    if (due != INT64_MAX) tpr_loop_timer(loop, &pipe->timer, due);
    return TPRPC_OK;
}

// ---- what is chosen, and why the rest is not

static void tpr_pipe_why(const tprpc_pipe *pipe, uint32_t i, tprpc_path *path) {
    const tpr_context_backend *entry = &pipe->ctx->backends[i];
    const char *why = "";
    snprintf(path->name, sizeof path->name, "%s", entry->backend->name);
    path->channel = entry->backend->channel != NULL;
    const tpr_pipe_channel *channel = NULL;
    for (uint32_t c = 0; c < pipe->channel_count; c++)
        if (pipe->channels[c]->entry == entry) channel = pipe->channels[c];
    if (!entry->viable) why = entry->why;
    else if (!path->channel && pipe->now.entry == entry) path->chosen = true;
    else if (!(pipe->offered & 1u << i))
        why = pipe->state < TPR_PIPE_AGREEING ? "not agreed yet" : "the peer does not offer it";
    else if (!(pipe->reached & 1u << i)) why = "the peer is out of its reach";
    else if (!path->channel && (pipe->tried & 1u << i))
        why = pipe->next.entry == entry ? pipe->move_why : "the pipe could not be moved to it";
    else if (!path->channel && entry->priority <= pipe->now.entry->priority) why = "another transport comes first";
    else if (!path->channel)
        why = pipe->connector ? "the peer does not listen on it" : "the peer, who connected, has not moved the pipe";
    else if (channel && channel->why[0]) why = channel->why;
    else if (!channel || !channel->end) why = "it could not be set up at both ends";
    else if (!channel->proved || !channel->verdict)
        why = "its proof failed: the memory of the other end cannot be reached";
    else if (channel->rate) why = "another channel was faster with large tensors";
    else why = "another channel comes first";
    snprintf(path->why, sizeof path->why, "%.109s", path->chosen ? "" : why);
}

static void tpr_pipe_info_of(tprpc_pipe *pipe, tprpc_pipe_info *info) {
    static const tprpc_device host = {TPRPC_CPU, 0};
    const tpr_pipe_channel *channel =
        pipe->state == TPR_PIPE_OPEN ? tpr_pipe_choose(pipe, host, host, NULL, 0, 0, false) : NULL;
    memset(info, 0, sizeof *info);
    if (pipe->state == TPR_PIPE_OPEN)
        snprintf(info->transport, sizeof info->transport, "%s", pipe->now.entry->backend->name);
    if (channel) snprintf(info->channel, sizeof info->channel, "%s", channel->entry->backend->name);
    if (pipe->now.conn) tpr_pipe_table(&pipe->now)->peer(pipe->now.conn, info->peer, sizeof info->peer);
    info->bytes_sent = pipe->bytes_sent;
    info->bytes_received = pipe->bytes_received;
    info->tensor_bytes_sent = pipe->tensor_bytes_sent;
    info->tensor_bytes_received = pipe->tensor_bytes_received;
    info->tensor_bytes_adopted = pipe->tensor_bytes_adopted;
    info->messages_sent = pipe->messages_sent;
    info->messages_received = pipe->messages_received;
    info->fallbacks = pipe->fallbacks;
    for (uint32_t i = 0; i < pipe->channel_count; i++) info->fallbacks += pipe->channels[i]->link.fallbacks;
    if (pipe->state == TPR_PIPE_ENDED) info->error = pipe->error;
    for (uint32_t i = 0; i < pipe->ctx->backend_count && info->path_count < TPR_COUNT(info->paths); i++) {
        if (pipe->ctx->backends[i].backend->converter) continue;
        tprpc_path *path = &info->paths[info->path_count++];
        tpr_pipe_why(pipe, i, path);
        if (channel && channel->entry == &pipe->ctx->backends[i]) {
            path->chosen = true;
            const bool missing = (pipe->lanes_wanted & ~pipe->lanes_open) != 0;
            snprintf(path->why, sizeof path->why, "%s", missing ? pipe->lane_why : "");
        }
    }
}

// Begins a descriptor's or a message's read.
static tprpc_status tpr_pipe_begin_read(tprpc_pipe *pipe, tpr_pipe_op *op, const tprpc_message *allocation) {
    tpr_pipe_in *in = op->kind == TPR_PIPE_READ ? tpr_pipe_arrived(pipe, true) : NULL;
    if (!in && allocation) return TPRPC_ERROR_INVALID;
    if (in && allocation) {
        bool same = allocation->tensor_count == in->message.tensor_count &&
                    allocation->payload_count == in->message.payload_count &&
                    (allocation->tensors || !allocation->tensor_count) &&
                    (allocation->payloads || !allocation->payload_count);
        for (size_t i = 0; same && i < allocation->tensor_count; i++) {
            const tprpc_tensor *t = &allocation->tensors[i];
            same = t->size == in->tensors[i].size && (t->data || !t->size);
        }
        for (size_t i = 0; same && i < allocation->payload_count; i++) {
            const tprpc_payload *p = &allocation->payloads[i];
            same = p->size == in->payloads[i].size && (p->data || !p->size);
        }
        if (!same) return TPRPC_ERROR_INVALID;
    }
    if (!in && pipe->state == TPR_PIPE_ENDED && !tpr_pipe_arrived(pipe, false)) return pipe->status;
    op->pipe = pipe;
    op->task.busy = &pipe->busy;
    pipe->refs++;
    tpr_base_list_add(&pipe->reads, &op->node);
    if (in) {
        tpr_pipe_op_read(op, in, allocation);
        return TPRPC_OK;
    }
    if (pipe->waiting == &pipe->reads) pipe->waiting = &op->node;
    tpr_pipe_match(pipe);
    return TPRPC_OK;
}

// ---- public

TPR_COLD
TPRPC_API tprpc_status tprpc_listen(tprpc_context *ctx, const tprpc_listener_desc *desc, tprpc_listener **out,
                                    tprpc_error *error) {
    TPRPC_ASSERT(ctx && desc && out);
    if (!ctx || !desc || !out || !tpr_context_usable(ctx) || !desc->address_count || !desc->addresses)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "tprpc_listen: no address, or a context that is not usable here");
    *out = NULL;
    return tpr_pipe_listen_for(ctx, desc, tpr_context_next_loop(ctx), NULL, NULL, out, error);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_accept(tprpc_listener *listener, tprpc_accepted done, void *user) {
    TPRPC_ASSERT(listener && done);
    if (!listener || !done || !tpr_context_usable(listener->ctx)) return TPRPC_ERROR_INVALID;
    tpr_loop *loop = listener->loop;
    tpr_loop_enter(loop);
    tpr_pipe_op *op = tpr_pipe_op_new(loop, TPR_PIPE_ACCEPT, user);
    if (op) {
        op->fn.accepted = done;
        op->listener = listener;
        op->task.busy = &listener->busy;
        listener->refs++;
        tpr_base_list_add(&listener->accepts, &op->node);
        tpr_pipe_listener_match(listener);
    }
    tpr_loop_leave(loop);
    return op ? TPRPC_OK : TPRPC_ERROR_MEMORY;
}

TPR_COLD
TPRPC_API const char *tprpc_listener_address(tprpc_listener *listener, const char *transport) {
    TPRPC_ASSERT(listener);
    for (uint32_t i = 0; listener && i < listener->count; i++) {
        const tpr_pipe_listen *address = &listener->addresses[i];
        if (address->given && (!transport || strcmp(address->entry->backend->name, transport) == 0))
            return address->address;
    }
    return NULL;
}

TPR_COLD
TPRPC_API void tprpc_listener_close(tprpc_listener *listener) {
    if (!listener || !tpr_context_usable(listener->ctx)) return;
    tpr_loop *loop = listener->loop;
    tpr_loop_enter(loop);
    tpr_pipe_listener_drop(listener);
    tpr_loop_leave(loop);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_connect(tprpc_context *ctx, const tprpc_pipe_desc *desc, tprpc_pipe **out,
                                     tprpc_error *error) {
    tprpc_error mine = TPR_ZERO;
    TPRPC_ASSERT(ctx && desc && out);
    if (!ctx || !desc || !out || !tpr_context_usable(ctx))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "tprpc_connect: an argument is NULL, or the context is not usable");
    tpr_loop *loop = tpr_context_next_loop(ctx);
    tpr_loop_enter(loop);
    *out = tpr_pipe_new(ctx, loop, true, desc->ordered, &mine);
    if (*out && tpr_pipe_reach(*out, desc, &mine) != TPRPC_OK) {
        tpr_pipe_free(*out);
        *out = NULL;
    }
    tpr_loop_leave(loop);
    if (!*out && error) *error = mine;
    return *out ? TPRPC_OK : mine.status;
}

TPRPC_API tprpc_status tprpc_pipe_write(tprpc_pipe *pipe, const tprpc_message *message, tprpc_written done,
                                        void *user) {
    static const tprpc_message empty = TPR_ZERO;
    tprpc_error error;
    TPRPC_ASSERT(pipe);
    if (!message) message = &empty;
    tprpc_status status = TPRPC_ERROR_INVALID;
    if (pipe && tpr_context_usable(pipe->ctx)) {
        tpr_loop *loop = pipe->loop;
        tpr_loop_enter(loop);
        if (TPR_LIKELY(!done && !message->release && tpr_pipe_takes_short(pipe, message) &&
                       message->metadata_size <= pipe->metadata_bytes &&
                       (message->metadata || !message->metadata_size))) {
            status = tpr_pipe_send_short(pipe, NULL, 0, message, &error);
            tpr_loop_leave(loop);
            return status;
        }
        status = tpr_pipe_check(message, pipe->message_bytes, pipe->metadata_bytes, pipe->tensors, &error);
        bool bare = !done && !message->release && pipe->state == TPR_PIPE_OPEN && tpr_pipe_is_inline(pipe, message);
        tpr_pipe_op *op = status == TPRPC_OK && !bare ? tpr_pipe_op_new(loop, TPR_PIPE_WRITE, user) : NULL;
        if (status == TPRPC_OK && bare) {
            status = tpr_pipe_send(pipe, NULL, NULL, 0, message, true, &error);
        } else if (status == TPRPC_OK && !op) {
            status = TPRPC_ERROR_MEMORY;
        } else if (op) {
            op->fn.written = done;
            op->pipe = pipe;
            op->task.busy = &pipe->busy;
            op->release = message->release;
            op->release_user = message->release_user;
            pipe->refs++;
            tpr_base_list_add(&pipe->write_ops, &op->node);
            tpr_pipe_write_begin(pipe, &op->write, tpr_pipe_op_written);
            status = tpr_pipe_send(pipe, &op->write, NULL, 0, message, message->release != NULL, &error);
            if (status != TPRPC_OK) {
                tpr_pipe_write_undo(&op->write);
                tpr_base_list_remove(&op->node);
                tpr_base_pool_free(&loop->pool, op, sizeof *op);
                tpr_pipe_unref(pipe);
            }
        }
        tpr_loop_leave(loop);
    }
    if (status != TPRPC_OK && message->release) message->release(message->release_user);
    return status;
}

TPRPC_API tprpc_status tprpc_pipe_read_descriptor(tprpc_pipe *pipe, tprpc_described done, void *user) {
    TPRPC_ASSERT(pipe && done);
    if (!pipe || !done || !tpr_context_usable(pipe->ctx)) return TPRPC_ERROR_INVALID;
    tpr_loop *loop = pipe->loop;
    tpr_loop_enter(loop);
    tpr_pipe_op *op = tpr_pipe_op_new(loop, TPR_PIPE_DESCRIBE, user);
    tprpc_status status = op ? TPRPC_OK : TPRPC_ERROR_MEMORY;
    if (op) {
        op->fn.described = done;
        status = tpr_pipe_begin_read(pipe, op, NULL);
        if (status != TPRPC_OK) tpr_base_pool_free(&loop->pool, op, sizeof *op);
    }
    tpr_loop_leave(loop);
    return status;
}

TPRPC_API tprpc_status tprpc_pipe_read(tprpc_pipe *pipe, const tprpc_message *allocation, tprpc_read done, void *user) {
    TPRPC_ASSERT(pipe);
    if (!pipe || !tpr_context_usable(pipe->ctx)) return TPRPC_ERROR_INVALID;
    tpr_loop *loop = pipe->loop;
    tpr_loop_enter(loop);
    tpr_pipe_op *op = tpr_pipe_op_new(loop, TPR_PIPE_READ, user);
    tprpc_status status = op ? TPRPC_OK : TPRPC_ERROR_MEMORY;
    if (op) {
        op->fn.read = done;
        status = tpr_pipe_begin_read(pipe, op, allocation);
        if (status != TPRPC_OK) tpr_base_pool_free(&loop->pool, op, sizeof *op);
    }
    tpr_loop_leave(loop);
    return status;
}

TPR_COLD
TPRPC_API void tprpc_pipe_close(tprpc_pipe *pipe) {
    if (!pipe || !tpr_context_usable(pipe->ctx)) return;
    tpr_loop *loop = pipe->loop;
    tpr_loop_enter(loop);
    if (!pipe->closed) tpr_pipe_drop(pipe);
    tpr_loop_leave(loop);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_pipe_get_info(tprpc_pipe *pipe, tprpc_pipe_info *out, size_t size) {
    TPRPC_ASSERT(pipe && out);
    if (!pipe || !out || size != sizeof *out || !tpr_context_usable(pipe->ctx)) return TPRPC_ERROR_INVALID;
    tpr_loop_enter(pipe->loop);
    tpr_pipe_info_of(pipe, out);
    tpr_loop_leave(pipe->loop);
    return TPRPC_OK;
}

// >>store ------------------------------------------------------------------------------------------------------------
// Stores, where workers find each other: local, over TCP, in a file, from the environment, and a user's own.
//
// Every operation belongs to the context that asked, whose loop its outcome reaches as deferred work. A local store is
// a map under the store's lock, so that contexts share it by pointer. The server of a tcp:// store is a local one with
// a listener; its clients, and file stores, work on the store's own loop, their home.
//
// Uses: atomic, os, base, wire, timer, loop, context, transport.
// Invariant: an operation is ended once, in tpr_store_end, under its store's lock, and a store lives until its
// operations have completed. A loop's lock is taken before a store's, never after it. Fields marked "home" are touched
// under the home loop's lock alone.

enum {
    TPR_STORE_TAG = 0x726f7473,            // "stor"
    TPR_STORE_TIMEOUT_MS = 60000,          // of a store that is given none
    TPR_STORE_HELLO_US = 10000000,         // for the first bytes of a connection
    TPR_STORE_WAITS = 4096,                // waiting gets of one connection
    TPR_STORE_BUSY = 64,                   // other operations of one connection, before it is read no further
    TPR_STORE_UNSENT = 256 << 10,          // bytes of replies of one connection, likewise
    TPR_STORE_INPUT = 4096, TPR_STORE_KEEP = 16384,   // bytes: a buffer's first size, and what an empty one keeps
    TPR_STORE_RETRY_LEAST_US = 10000, TPR_STORE_RETRY_MOST_US = 500000,    // between attempts to connect
    TPR_STORE_LOCK_LEAST_US = 1000, TPR_STORE_LOCK_MOST_US = 50000,        // between attempts to lock a file
    TPR_STORE_LOOK_LEAST_US = 5000, TPR_STORE_LOOK_MOST_US = 100000,       // between looks for a key in a file
    TPR_STORE_FILE_BUFFER = 128 << 10, TPR_STORE_FILE_TURN = 1 << 20       // bytes read at once, and in one turn
};

typedef struct tpr_store_map { tpr_base_memory *memory; tpr_base_map index; } tpr_store_map;   // index: by hash
typedef struct tpr_store_buffer { uint8_t *data; size_t at, size, capacity; } tpr_store_buffer;

typedef struct tpr_store_kind {            // the kinds of stores; the lock is the store's
    void (*submit)(tprpc_store *store, tprpc_store_op *op, tpr_base_list *ended);   // under the lock
    void (*cancel)(tprpc_store *store, tprpc_store_op *op, tpr_base_list *ended);   // under the lock
    void (*begin)(tprpc_store *store, tprpc_store_op *op, bool cancelled);          // home: one that was queued
    void (*step)(tprpc_store *store);      // home: after begin
    void (*shut)(tprpc_store *store);      // home: lets go of the world
    void (*end)(tprpc_store *store);       // home: gives back what is left
} tpr_store_kind;

typedef struct tpr_store_conn {            // one end of a connection of a tcp:// store; home
    tprpc_conn_owner owner;
    tpr_base_list    node, ops;            // in the store's conns or strangers; operations served, or sent and not
                                           // replied to
    tprpc_store     *store;
    void            *conn;
    tprpc_work       timer;                // a server's: until its hello
    bool             known;                // said hello
    uint32_t         busy, waits;          // operations served: gets that wait, and all others
    uint8_t          first[TPR_WIRE_STORE_HELLO];
    uint32_t         first_size;
    tpr_store_buffer in, out;
} tpr_store_conn;

typedef enum tpr_store_state {             // of a client
    TPR_STORE_IDLE, TPR_STORE_PAUSED, TPR_STORE_CONNECTING, TPR_STORE_GREETING, TPR_STORE_READY, TPR_STORE_LOST
} tpr_store_state;

struct tprpc_store {
    tpr_loop_object object;
    const tpr_store_kind *kind;
    tprpc_context  *context;
    tpr_loop       *home;
    const char     *name;                  // its URL, behind the struct
    size_t          bytes;                 // of the struct with it
    int64_t         timeout_ms;            // TPRPC_FOREVER: none
    bool            insecure;
    uint32_t        refs;                  // atomic: the user's, and each operation's until it has completed
    tpr_os_lock     lock;                  // of the next seven
    bool            closed, posted;        // posted: work is on its way
    tpr_base_list   ops, queue;            // not ended; of those, what the home loop has to look at
    tpr_store_map   map;                   // a file's: home
    char            why[160];              // what stands in the way now; "": nothing
    tprpc_work      work, end_work, timer; // timer: home
    tpr_loop_task   task;                  // calls a user's close

    const tprpc_store_table *table;        // a user's
    void           *user;

    const tprpc_transport_table *transport;   // tcp's; home
    void           *instance, *listener;
    tprpc_listen_owner listen_owner;
    tpr_base_list   conns, strangers;      // a server's: those that said hello, and those that did not
    uint32_t        conn_count, unknown;   // of both; of strangers
    char            address[80];
    tpr_store_state state;                 // from here on a client's
    tpr_store_conn *conn;
    tpr_base_list   unsent;
    int64_t         deadline_us, retry_us;
    uint64_t        last_id;
    tprpc_error     lost;

    int             fd;                    // file's; home
    bool            damaged;               // something was read that is no record
    uint8_t        *buffer;
    int64_t         offset, wait_us, look_us;   // read so far; time to the next attempt to lock, and the next look
    tpr_base_list   active, waiting;       // to be done in order; gets whose key is not there
};

struct tprpc_store_op {
    tprpc_work      work;                  // runs under the lock of the asking context's loop when it is finished
    tprpc_work      timer, cancel_work;    // its deadline; asks a user's store to end it
    tpr_loop_task   task, cancel_task;     // what runs without a lock
    tprpc_store    *store;
    tprpc_context  *context;
    uint32_t        loop;
    uint32_t        places;                // tasks posted and not over; of its loop, like the next two
    bool            completed;             // all but those
    bool            kept;                  // by `done`, which frees it
    bool            nowait, counted;       // a get that does not wait; one of its connection's `busy`
    tpr_base_list   node;                  // in the store's ops or queue; its lock's
    tpr_base_list   link, served;          // in a list of its kind; in that of the connection that asked
    tprpc_store_request request;
    int64_t         begun_us, wait_ms;     // wait_ms: of a get whose deadline counts from begun_us; 0: others
    uint64_t        id;                    // on the wire; 0: was not sent
    uint32_t        finished;              // atomic, set under the store's lock
    tprpc_status    cause;                 // why it was cancelled; TPRPC_OK: it was not
    tprpc_status    status;                // from here on the outcome
    tprpc_error     error;
    void           *value;                 // NULL: there is none
    size_t          value_size;
    void          (*done)(tprpc_store_op *op, void *user);
    void           *user;
    tprpc_store_done callback;             // a user's, which gets `user`
    size_t          bytes;                 // of the struct with the request's strings
};

static tprpc_status tpr_store_submit(tprpc_store *store, tprpc_context *ctx, uint32_t loop,
                                     const tprpc_store_request *request, void (*done)(tprpc_store_op *op, void *user),
                                     void *user, tprpc_store_op **out, tprpc_error *error);
static void tpr_store_cancel(tprpc_store *store, tprpc_store_op *op);

static tpr_base_bytes tpr_store_bytes(const void *data, size_t size) {
    tpr_base_bytes bytes = {(const uint8_t *)data, size};
    return bytes;
}

// Fills *error (NULL allowed), "store NAME: " before the text, and returns status.
__attribute__((format(printf, 4, 5)))
TPR_COLD
static tprpc_status tpr_store_error(const tprpc_store *store, tprpc_error *error, tprpc_status status,
                                    const char *format, ...) {
    char text[TPR_COUNT(error->text)];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return tprpc_error_set(error, status, 0, "store %.100s: %s", store->name, text);
}

static tpr_base_memory *tpr_store_memory(tprpc_store *store) { return &store->context->env.memory; }

static void tpr_store_set_timer(tprpc_store *store, int64_t due_us) {
    tpr_timer_cancel(&store->home->wheel, &store->timer);
    tpr_loop_timer(store->home, &store->timer, due_us);
}

// ---- the life of an operation

static void tpr_store_op_free(tprpc_store_op *op) {
    tpr_base_memory *memory = &op->context->env.memory;
    tpr_base_free(memory, op->value, op->value_size, (uint32_t)TPR_STORE_TAG);
    tpr_base_free(memory, op, op->bytes, (uint32_t)TPR_STORE_TAG);
}

// Gives back a reference. The store's last rites are its home loop's.
static void tpr_store_release(tprpc_store *store) {
    tpr_loop *home = store->home;
    if (TPR_ATOMIC_SUB(&store->refs, 1u) == 1) tpr_loop_defer(home, &store->end_work, false);
}

// The timer may be set but not on its way: it was deferred before the operation could end.
TPR_COLD static void tpr_store_complete(tprpc_store_op *op) {
    tprpc_store *store = op->store;
    op->completed = true;
    if (op->places) return;
    tpr_timer_cancel(&op->context->loops[op->loop].wheel, &op->timer);
    if (op->done) op->done(op, op->user);
    if (!op->kept) tpr_store_op_free(op);
    tpr_store_release(store);
}

TPR_COLD
static void tpr_store_complete_run(tprpc_work *work) { tpr_store_complete(TPR_CONTAINER(work, tprpc_store_op, work)); }

static const char *tpr_store_verb(int32_t kind) {
    static const char *const verbs[] = {"?", "set", "get", "add", "compare_set", "delete"};
    return (size_t)kind < TPR_COUNT(verbs) ? verbs[kind] : "?";
}

// Says that an operation's time is over, and what stood in its way. Under the store's lock.
static tprpc_status tpr_store_late(const tprpc_store_op *op, int64_t after_ms, tprpc_error *error) {
    const char *why = op->store->why, *open = why[0] ? " (" : "", *close = why[0] ? ")" : "";
    if (op->nowait && after_ms == 0)
        return tpr_store_error(op->store, error, TPRPC_ERROR_TIMEOUT, "no key '%.100s'", op->request.key);
    if (op->request.kind == TPRPC_STORE_GET)
        return tpr_store_error(op->store, error, TPRPC_ERROR_TIMEOUT, "no key '%.60s' after %lld ms%s%s%s",
                               op->request.key, (long long)after_ms, open, why, close);
    return tpr_store_error(op->store, error, TPRPC_ERROR_TIMEOUT, "no answer to %s '%.60s' after %lld ms%s%s%s",
                           tpr_store_verb(op->request.kind), op->request.key, (long long)after_ms, open, why, close);
}

static tprpc_status tpr_store_cause_error(const tprpc_store_op *op, tprpc_error *error) {
    bool waits = op->request.kind == TPRPC_STORE_GET && !op->nowait;
    int64_t until = waits ? op->request.deadline_us : tprpc_now_us(op->context);
    if (op->cause == TPRPC_ERROR_TIMEOUT) return tpr_store_late(op, (until - op->begun_us + 500) / 1000, error);
    return tpr_store_error(op->store, error, op->cause, "%s '%.60s' was %s", tpr_store_verb(op->request.kind),
                           op->request.key,
                           op->cause == TPRPC_ERROR_CLOSED ? "under way when the store was closed" : "cancelled");
}

// Ends an operation that is not ended, under its store's lock. The value (no data: none) is copied; error may be NULL.
// It goes to the list `ended`, which the caller flushes once he holds the lock no longer.
static void tpr_store_end(tprpc_store_op *op, tprpc_status status, tpr_base_bytes value, const tprpc_error *error,
                          tpr_base_list *ended) {
    if (status == TPRPC_OK && value.data) {
        op->value = tprpc_alloc(op->context, value.size, 16, (uint32_t)TPR_STORE_TAG);
        if (op->value) {
            op->value_size = value.size;
            tpr_base_copy(op->value, value.data, value.size);
        } else {
            status = tpr_store_error(op->store, &op->error, TPRPC_ERROR_MEMORY, "no memory for the value of '%.60s'",
                                     op->request.key);
        }
    } else if (status == TPRPC_ERROR_CANCELLED && op->cause != TPRPC_OK) {
        status = tpr_store_cause_error(op, &op->error);
    } else if (status != TPRPC_OK && error) {
        op->error = *error;
        op->error.status = status;
    } else if (status != TPRPC_OK) {
        tpr_store_error(op->store, &op->error, status, "%s '%.60s' failed: %s", tpr_store_verb(op->request.kind),
                        op->request.key, tprpc_status_name(status));
    }
    op->status = status;
    tpr_base_list_remove(&op->node);
    tpr_base_list_add(ended, &op->node);
    TPR_ATOMIC_STORE(&op->finished, 1u);
}

static void tpr_store_flush(tpr_base_list *ended) {
    while (!tpr_base_list_empty(ended)) {
        tprpc_store_op *op = TPR_CONTAINER(ended->next, tprpc_store_op, node);
        tpr_base_list_remove(&op->node);
        op->work.run = tpr_store_complete_run;
        tprpc_defer(op->context, &op->work);   // from here on it may be gone
    }
}

// Ends an operation that may have been ended. Any thread, no store's lock.
static void tpr_store_finish(tprpc_store_op *op, tprpc_status status, const void *value, size_t size,
                             const tprpc_error *error) {
    tprpc_store *store = op->store;
    tpr_base_list ended;
    tpr_base_list_init(&ended);
    tpr_os_lock_take(&store->lock);
    if (!op->finished) tpr_store_end(op, status, tpr_store_bytes(value, size), error, &ended);
    tpr_os_lock_give(&store->lock);
    tpr_store_flush(&ended);
}

// Wakes the home loop for what is queued. Under the store's lock.
static void tpr_store_post(tprpc_store *store) {
    if (store->posted) return;
    store->posted = true;
    tpr_loop_defer(store->home, &store->work, false);
}

TPR_COLD static void tpr_store_queue(tprpc_store *store, tprpc_store_op *op, tpr_base_list *ended) {
    (void)ended;
    tpr_base_list_remove(&op->node);
    tpr_base_list_add(&store->queue, &op->node);
    tpr_store_post(store);
}

TPR_COLD static void tpr_store_work_run(tprpc_work *work) {
    tprpc_store *store = TPR_CONTAINER(work, tprpc_store, work);
    for (;;) {
        tprpc_store_op *op = NULL;
        tpr_os_lock_take(&store->lock);
        if (tpr_base_list_empty(&store->queue)) {
            store->posted = false;
        } else {
            op = TPR_CONTAINER(store->queue.next, tprpc_store_op, node);
            tpr_base_list_remove(&op->node);
            tpr_base_list_add(&store->ops, &op->node);
        }
        bool cancelled = op && op->cause != TPRPC_OK;
        tpr_os_lock_give(&store->lock);
        if (!op) break;
        store->kind->begin(store, op, cancelled);
    }
    store->kind->step(store);
}

static void tpr_store_why(tprpc_store *store, const char *why) {
    tpr_os_lock_take(&store->lock);
    snprintf(store->why, sizeof store->why, "%.150s", why);
    tpr_os_lock_give(&store->lock);
}

// Asks that an operation end, with `cause`. It must not have completed.
TPR_COLD static void tpr_store_cancel_for(tprpc_store *store, tprpc_store_op *op, tprpc_status cause) {
    tpr_base_list ended;
    tpr_base_list_init(&ended);
    tpr_os_lock_take(&store->lock);
    if (!op->finished && op->cause == TPRPC_OK) {
        op->cause = cause;
        store->kind->cancel(store, op, &ended);
    }
    tpr_os_lock_give(&store->lock);
    tpr_store_flush(&ended);
}

TPR_COLD static void tpr_store_timer_run(tprpc_work *work) {
    tprpc_store_op *op = TPR_CONTAINER(work, tprpc_store_op, timer);
    tpr_store_cancel_for(op->store, op, TPRPC_ERROR_TIMEOUT);
}

// ---- the map

typedef struct tpr_store_entry {           // its key stands behind it
    struct tpr_store_entry *next;          // of the same hash
    tpr_base_list waiters;                 // gets of a local store
    uint8_t      *value;                   // NULL: absent
    size_t        value_size, key_size;
} tpr_store_entry;

static const char *tpr_store_entry_key(const tpr_store_entry *entry) { return (const char *)(entry + 1); }

// The entry of a key, made where there is none and `create` is set (NULL then: no memory).
static tpr_store_entry *tpr_store_map_find(tpr_store_map *map, tpr_base_bytes key, bool create) {
    uint64_t hash = tpr_base_hash(key.data, key.size);
    tpr_store_entry *first = (tpr_store_entry *)tpr_base_map_get(&map->index, hash), *entry = first;
    while (entry && (entry->key_size != key.size || memcmp(tpr_store_entry_key(entry), key.data, key.size) != 0))
        entry = entry->next;
    if (entry || !create) return entry;
    entry = (tpr_store_entry *)tpr_base_new(map->memory, sizeof *entry + key.size, (uint32_t)TPR_STORE_TAG);
    if (!entry) return NULL;
    tpr_base_list_init(&entry->waiters);
    entry->next = first;
    entry->key_size = key.size;
    memcpy(entry + 1, key.data, key.size);
    if (tpr_base_map_put(&map->index, hash, entry)) return entry;
    tpr_base_free(map->memory, entry, sizeof *entry + key.size, (uint32_t)TPR_STORE_TAG);
    return NULL;
}

static void tpr_store_entry_free(tpr_store_map *map, tpr_store_entry *entry) {
    tpr_base_free(map->memory, entry->value, entry->value_size, (uint32_t)TPR_STORE_TAG);
    tpr_base_free(map->memory, entry, sizeof *entry + entry->key_size, (uint32_t)TPR_STORE_TAG);
}

// Removes an entry that has neither a value nor anyone who waits for it.
static void tpr_store_map_tidy(tpr_store_map *map, tpr_store_entry *entry) {
    if (!entry || entry->value || !tpr_base_list_empty(&entry->waiters)) return;
    uint64_t hash = tpr_base_hash(tpr_store_entry_key(entry), entry->key_size);
    tpr_store_entry *first = (tpr_store_entry *)tpr_base_map_remove(&map->index, hash);
    if (first == entry) {
        first = entry->next;
    } else {
        tpr_store_entry *before = first;
        while (before->next != entry) before = before->next;
        before->next = entry->next;
    }
    if (first) tpr_base_map_put(&map->index, hash, first);   // has room: one was just removed
    tpr_store_entry_free(map, entry);
}

// Stores a value, or removes the key when it has no data. False: no memory, and nothing changed.
static bool tpr_store_map_write(tpr_store_map *map, tpr_base_bytes key, tpr_base_bytes value) {
    tpr_store_entry *entry = tpr_store_map_find(map, key, value.data != NULL);
    uint8_t *copy = NULL;
    if (!entry) return !value.data;
    if (value.data) {
        copy = (uint8_t *)tpr_base_alloc(map->memory, value.size, 16, (uint32_t)TPR_STORE_TAG);
        if (copy) tpr_base_copy(copy, value.data, value.size);
    }
    if (copy || !value.data) {
        tpr_base_free(map->memory, entry->value, entry->value_size, (uint32_t)TPR_STORE_TAG);
        entry->value = copy;
        entry->value_size = value.size;
    }
    tpr_store_map_tidy(map, entry);
    return copy || !value.data;
}

static void tpr_store_map_clear(tpr_store_map *map) {
    for (uint32_t i = 0; i < map->index.capacity; i++) {
        tpr_store_entry *entry = (tpr_store_entry *)map->index.entries[i].value;
        while (entry) {
            tpr_store_entry *next = entry->next;
            tpr_store_entry_free(map, entry);
            entry = next;
        }
    }
    tpr_base_map_clear(&map->index);
}

// ---- what operations mean

typedef struct tpr_store_outcome {
    tpr_base_bytes shown, value;           // value: to store, if `write` is set; no data: to remove
    bool    write;
    int64_t sum;
    char    decimal[24];
} tpr_store_outcome;

static tpr_base_bytes tpr_store_key(const tprpc_store_op *op) {
    return tpr_store_bytes(op->request.key, strlen(op->request.key));
}

TPR_COLD static bool tpr_store_number(tpr_base_bytes text, int64_t *out) {
    char digits[24], *end;
    size_t sign = text.size > 0 && text.data[0] == '-';
    if (text.size <= sign || text.size >= sizeof digits || text.data[sign] < '0' || text.data[sign] > '9') return false;
    memcpy(digits, text.data, text.size);
    digits[text.size] = 0;
    errno = 0;
    *out = (int64_t)strtoll(digits, &end, 10);
    return errno == 0 && end == digits + text.size;
}

// What an operation does to what its key holds (no data: absent) and what it shows. PENDING: a get of an absent key.
static tprpc_status tpr_store_judge(const tprpc_store_op *op, tpr_base_bytes held, tpr_store_outcome *out,
                                    tprpc_error *error) {
    const tprpc_store_request *r = &op->request;
    tpr_base_bytes expected = tpr_store_bytes(r->expected, r->expected_size);
    bool same = held.data && expected.data && held.size == expected.size &&
                (held.size == 0 || memcmp(held.data, expected.data, held.size) == 0);
    memset(out, 0, sizeof *out);
    switch (r->kind) {
    case TPRPC_STORE_GET:
        out->shown = held;
        return held.data ? TPRPC_OK : TPRPC_PENDING;
    case TPRPC_STORE_ADD:
        if ((held.data && !tpr_store_number(held, &out->sum)) || __builtin_add_overflow(out->sum, r->delta, &out->sum))
            return tpr_store_error(op->store, error, TPRPC_ERROR_INVALID, "the value of '%.60s' is no decimal number "
                                   "to which %lld can be added", r->key, (long long)r->delta);
        out->value.size = (size_t)snprintf(out->decimal, sizeof out->decimal, "%lld", (long long)out->sum);
        out->value.data = (const uint8_t *)out->decimal;
        out->shown = tpr_store_bytes(&out->sum, sizeof out->sum);
        break;
    case TPRPC_STORE_DELETE:
        out->decimal[0] = (char)(held.data != NULL);
        out->shown = tpr_store_bytes(out->decimal, 1);
        out->write = held.data != NULL;
        return TPRPC_OK;
    case TPRPC_STORE_COMPARE_SET:
        out->shown = held;
        if (!same && (held.data || expected.data)) return TPRPC_OK;
        out->value = out->shown = tpr_store_bytes(r->value, r->value_size);
        break;
    default:
        out->value = tpr_store_bytes(r->value, r->value_size);
        break;
    }
    out->write = true;
    return TPRPC_OK;
}

// ---- local

TPR_COLD static void tpr_store_local_submit(tprpc_store *store, tprpc_store_op *op, tpr_base_list *ended) {
    tpr_base_bytes key = tpr_store_key(op), none = tpr_base_bytes_none();
    tpr_store_entry *entry = tpr_store_map_find(&store->map, key, false);
    tpr_store_outcome outcome;
    tprpc_error error = TPR_ZERO;
    tprpc_status status = tpr_store_judge(op, entry ? tpr_store_bytes(entry->value, entry->value_size) : none, &outcome,
                                          &error);
    if (status == TPRPC_PENDING && op->nowait) {
        tpr_store_end(op, tpr_store_late(op, 0, &error), none, &error, ended);
        return;
    }
    if (status == TPRPC_PENDING && (entry = tpr_store_map_find(&store->map, key, true)) != NULL) {
        tpr_base_list_add(&entry->waiters, &op->link);
        return;
    }
    if (status == TPRPC_PENDING || (outcome.write && !tpr_store_map_write(&store->map, key, outcome.value)))
        status = tpr_store_error(store, &error, TPRPC_ERROR_MEMORY, "no memory for '%.60s'", op->request.key);
    tpr_store_end(op, status, outcome.shown, &error, ended);
    if (status != TPRPC_OK || !outcome.write || !outcome.value.data) return;
    entry = tpr_store_map_find(&store->map, key, false);
    while (!tpr_base_list_empty(&entry->waiters)) {
        tprpc_store_op *waiter = TPR_CONTAINER(entry->waiters.next, tprpc_store_op, link);
        tpr_base_list_remove(&waiter->link);
        tpr_store_end(waiter, TPRPC_OK, tpr_store_bytes(entry->value, entry->value_size), NULL, ended);
    }
}

TPR_COLD static void tpr_store_local_cancel(tprpc_store *store, tprpc_store_op *op, tpr_base_list *ended) {
    tpr_base_list_remove(&op->link);
    tpr_store_map_tidy(&store->map, tpr_store_map_find(&store->map, tpr_store_key(op), false));
    tpr_store_end(op, TPRPC_ERROR_CANCELLED, tpr_base_bytes_none(), NULL, ended);
}

static void tpr_store_nothing(tprpc_store *store) { (void)store; }

static const tpr_store_kind tpr_store_local = {tpr_store_local_submit, tpr_store_local_cancel, NULL, NULL,
                                               tpr_store_nothing, tpr_store_nothing};

// ---- a user's own: its functions are called without a lock, so through tasks, which whoever drives the loop runs

TPR_COLD static void tpr_store_place_over(tprpc_store_op *op) {
    if (--op->places == 0 && op->completed) tpr_store_complete(op);
}

TPR_COLD static void tpr_store_user_submit_run(tpr_loop_task *task) {
    tprpc_store_op *op = TPR_CONTAINER(task, tprpc_store_op, task);
    op->store->table->submit(op->store->user, op, &op->request);
}

static void tpr_store_user_submit_over(tpr_loop_task *task) {
    tpr_store_place_over(TPR_CONTAINER(task, tprpc_store_op, task));
}

TPR_COLD static void tpr_store_user_submit_place(tprpc_work *work) {
    tprpc_store_op *op = TPR_CONTAINER(work, tprpc_store_op, work);
    op->task.run = tpr_store_user_submit_run;
    op->task.done = tpr_store_user_submit_over;
    op->places++;
    tpr_loop_post_place(&op->context->loops[op->loop], &op->task);
}

static void tpr_store_user_submit(tprpc_store *store, tprpc_store_op *op, tpr_base_list *ended) {
    (void)store;
    (void)ended;
    op->work.run = tpr_store_user_submit_place;
    tprpc_defer(op->context, &op->work);
}

TPR_COLD static void tpr_store_user_cancel_run(tpr_loop_task *task) {
    tprpc_store_op *op = TPR_CONTAINER(task, tprpc_store_op, cancel_task);
    if (op->store->table->cancel && !TPR_ATOMIC_LOAD(&op->finished)) op->store->table->cancel(op->store->user, op);
}

static void tpr_store_user_cancel_over(tpr_loop_task *task) {
    tpr_store_place_over(TPR_CONTAINER(task, tprpc_store_op, cancel_task));
}

TPR_COLD static void tpr_store_user_cancel_place(tprpc_work *work) {
    tprpc_store_op *op = TPR_CONTAINER(work, tprpc_store_op, cancel_work);
    op->cancel_task.run = tpr_store_user_cancel_run;
    op->cancel_task.done = tpr_store_user_cancel_over;
    op->places++;
    tpr_loop_post_place(&op->context->loops[op->loop], &op->cancel_task);
}

static void tpr_store_user_cancel(tprpc_store *store, tprpc_store_op *op, tpr_base_list *ended) {
    (void)store;
    (void)ended;
    op->cancel_work.run = tpr_store_user_cancel_place;
    tprpc_defer(op->context, &op->cancel_work);
}

static const tpr_store_kind tpr_store_users = {tpr_store_user_submit, tpr_store_user_cancel, NULL, NULL,
                                               tpr_store_nothing, tpr_store_nothing};

// ---- tcp: a connection, as both ends use it

// Makes room for `size` bytes behind what a buffer holds. False: no memory.
static bool tpr_store_reserve(tprpc_store *store, tpr_store_buffer *b, size_t size) {
    if (b->at > 0) {
        memmove(b->data, b->data + b->at, b->size - b->at);
        b->size -= b->at;
        b->at = 0;
    }
    if (b->capacity - b->size >= size) return true;
    size_t capacity = b->capacity ? b->capacity : (size_t)TPR_STORE_INPUT;
    while (capacity - b->size < size) capacity *= 2;
    uint8_t *data = (uint8_t *)tpr_base_alloc(tpr_store_memory(store), capacity, 16, (uint32_t)TPR_STORE_TAG);
    if (!data) return false;
    tpr_base_copy(data, b->data, b->size);
    tpr_base_free(tpr_store_memory(store), b->data, b->capacity, (uint32_t)TPR_STORE_TAG);
    b->data = data;
    b->capacity = capacity;
    return true;
}

// An empty buffer starts again, and a large one is given back.
static void tpr_store_rest(tprpc_store *store, tpr_store_buffer *b, size_t keep) {
    if (b->at < b->size) return;
    b->at = b->size = 0;
    if (b->capacity <= keep) return;
    tpr_base_free(tpr_store_memory(store), b->data, b->capacity, (uint32_t)TPR_STORE_TAG);
    b->data = NULL;
    b->capacity = 0;
}

static tpr_store_conn *tpr_store_conn_new(tprpc_store *store, void (*event)(tprpc_conn_owner *, uint32_t,
                                                                            const tprpc_error *)) {
    tpr_store_conn *c = (tpr_store_conn *)tpr_base_new(tpr_store_memory(store), sizeof *c, (uint32_t)TPR_STORE_TAG);
    if (!c) return NULL;
    c->owner.event = event;
    c->store = store;
    tpr_base_list_init(&c->node);
    tpr_base_list_init(&c->ops);
    return c;
}

static void tpr_store_conn_free(tpr_store_conn *c, tprpc_status cause) {
    tprpc_store *store = c->store;
    tpr_timer_cancel(&store->home->wheel, &c->timer);
    if (c->conn) store->transport->disconnect(c->conn, cause);
    tpr_base_free(tpr_store_memory(store), c->in.data, c->in.capacity, (uint32_t)TPR_STORE_TAG);
    tpr_base_free(tpr_store_memory(store), c->out.data, c->out.capacity, (uint32_t)TPR_STORE_TAG);
    tpr_base_free(tpr_store_memory(store), c, sizeof *c, (uint32_t)TPR_STORE_TAG);
}

static const char *tpr_store_conn_peer(tpr_store_conn *c, char *out, size_t size) {   // out: the caller's buffer
    out[0] = 0;
    c->store->transport->peer(c->conn, out, size);
    return out;
}

static void tpr_store_conn_flush(tpr_store_conn *c) {
    while (c->out.at < c->out.size) {
        tprpc_span span = {c->out.data + c->out.at, c->out.size - c->out.at};
        size_t n = c->store->transport->send(c->conn, &span, 1, NULL, 0, false);
        c->out.at += n;
        if (n < span.size) return;
    }
    tpr_store_rest(c->store, &c->out, TPR_STORE_KEEP);
}

static bool tpr_store_conn_put(tpr_store_conn *c, const tpr_wire_store_frame *frame) {
    size_t size = tpr_wire_store_size(frame);
    if (!tpr_store_reserve(c->store, &c->out, size)) return false;
    tpr_wire_store_write(frame, c->out.data + c->out.size);
    c->out.size += size;
    tpr_store_conn_flush(c);
    return true;
}

// Sends the hello, which a connection with nothing sent yet takes whole.
static void tpr_store_conn_greet(tpr_store_conn *c, tprpc_status status) {
    uint8_t hello[TPR_WIRE_STORE_HELLO];
    tprpc_span span = {hello, sizeof hello};
    tpr_wire_store_write_hello(hello, status);
    c->store->transport->send(c->conn, &span, 1, NULL, 0, false);
}

// Reads the peer's hello: PENDING while it is not there, OK, or why it is refused.
static tprpc_status tpr_store_conn_hello(tpr_store_conn *c, tprpc_error *error) {
    tpr_wire_store_hello hello;
    tprpc_span span = {c->first + c->first_size, sizeof c->first - c->first_size};
    tprpc_status status;
    char peer[64];
    tpr_store_conn_peer(c, peer, sizeof peer);
    c->first_size += (uint32_t)c->store->transport->recv(c->conn, &span, 1);
    if (!tpr_wire_store_begins(c->first, c->first_size))
        return tpr_store_error(c->store, error, TPRPC_ERROR_PROTOCOL, "%.60s does not speak tprpc's store protocol",
                               peer);
    if (c->first_size < sizeof c->first) return TPRPC_PENDING;
    if (!tpr_wire_store_read_hello(c->first, sizeof c->first, &hello) || hello.major != TPR_WIRE_STORE_MAJOR)
        return tpr_store_error(c->store, error, TPRPC_ERROR_PROTOCOL, "%.60s speaks version %u of the store protocol, "
                               "not %u", peer, (unsigned)hello.major, (unsigned)TPR_WIRE_STORE_MAJOR);
    if (hello.status != (uint32_t)TPRPC_OK)
        return tpr_store_error(c->store, error, (tprpc_status)hello.status, "%.60s refused this process (%s)", peer,
                               tprpc_status_name((tprpc_status)hello.status));
    status = c->store->transport->check_peer(c->conn, error);
    if (status == TPRPC_ERROR_UNSUPPORTED && c->store->insecure) status = TPRPC_OK;
    c->known = status == TPRPC_OK;
    return status;
}

// Takes the next frame: OK, valid until the next call; PENDING: not there yet; else what is wrong.
static tprpc_status tpr_store_conn_next(tpr_store_conn *c, tpr_wire_store_frame *frame) {
    for (;;) {
        size_t length = 0, have = c->in.size - c->in.at;
        int whole = have ? tpr_wire_store_split(c->in.data + c->in.at, have, &length) : 0;
        if (whole > 0 && tpr_wire_store_read(c->in.data + c->in.at, length, frame)) {
            c->in.at += length;
            return TPRPC_OK;
        }
        if (whole != 0) return TPRPC_ERROR_PROTOCOL;
        tpr_store_rest(c->store, &c->in, TPR_STORE_KEEP);
        if (!tpr_store_reserve(c->store, &c->in, have && length > have ? length - have : 1)) return TPRPC_ERROR_MEMORY;
        tprpc_span span = {c->in.data + c->in.size, c->in.capacity - c->in.size};
        size_t n = c->store->transport->recv(c->conn, &span, 1);
        if (n == 0) return TPRPC_PENDING;
        c->in.size += n;
    }
}

// ---- tcp: the server

static void tpr_store_server_drop(tpr_store_conn *c, tprpc_status cause) {
    tprpc_store *store = c->store;
    store->conn_count--;
    if (!c->known) store->unknown--;
    tpr_base_list_remove(&c->node);
    while (!tpr_base_list_empty(&c->ops)) {
        tprpc_store_op *op = TPR_CONTAINER(c->ops.next, tprpc_store_op, served);
        tpr_base_list_remove(&op->served);
        op->done = NULL;
        tpr_store_cancel(store, op);
    }
    tpr_store_conn_free(c, cause);
}

static bool tpr_store_server_reply(tpr_store_conn *c, uint64_t id, tprpc_status status, tpr_base_bytes value,
                                   const tprpc_error *error) {
    tpr_wire_store_frame frame = TPR_ZERO;
    frame.type = TPR_WIRE_STORE_REPLY;
    frame.id = id;
    frame.status = (uint32_t)status;
    if (value.data) frame.flags = TPR_WIRE_STORE_PRESENT;
    frame.value = value;
    if (status != TPRPC_OK) {
        frame.os_code = error->os_code;
        frame.text = tpr_store_bytes(error->text, strlen(error->text));
    }
    return tpr_store_conn_put(c, &frame);
}

static bool tpr_store_server_read(tpr_store_conn *c);

TPR_COLD static void tpr_store_served(tprpc_store_op *op, void *user) {
    tpr_store_conn *c = (tpr_store_conn *)user;
    tpr_base_list_remove(&op->served);
    if (op->counted) c->busy--;
    else c->waits--;
    tpr_base_bytes value = tpr_store_bytes(op->value, op->value_size);
    if (op->cause == TPRPC_OK && !tpr_store_server_reply(c, op->id, op->status, value, &op->error))
        tpr_store_server_drop(c, TPRPC_ERROR_MEMORY);
    else tpr_store_server_read(c);
}

// Whether a connection's gets may be waited for no further. Those that have ended, but not completed, wait no more.
static bool tpr_store_server_full(tpr_store_conn *c) {
    if (c->waits < (uint32_t)TPR_STORE_WAITS) return false;
    for (tpr_base_list *i = c->ops.next; i != &c->ops; i = i->next) {
        tprpc_store_op *op = TPR_CONTAINER(i, tprpc_store_op, served);
        if (op->counted || !TPR_ATOMIC_LOAD(&op->finished)) continue;
        op->counted = true;
        c->waits--;
        c->busy++;
    }
    return c->waits >= (uint32_t)TPR_STORE_WAITS;
}

// False: no memory for the answer.
static bool tpr_store_server_request(tpr_store_conn *c, const tpr_wire_store_frame *frame) {
    tprpc_store_request request = TPR_ZERO;
    tprpc_store_op *op = NULL;
    tprpc_error error = TPR_ZERO;
    char key[TPR_WIRE_STORE_KEY + 1];
    tprpc_status status;
    memcpy(key, frame->key.data, frame->key.size);
    key[frame->key.size] = 0;
    request.size = (uint32_t)sizeof request;
    request.kind = frame->kind;
    request.key = key;
    request.value = frame->value.data;
    request.value_size = frame->value.size;
    if (frame->flags & TPR_WIRE_STORE_EXPECTED) request.expected = frame->expected.data;
    request.expected_size = frame->expected.size;
    request.delta = frame->delta;
    request.deadline_us = (frame->flags & TPR_WIRE_STORE_NOWAIT) ? TPRPC_NOW : TPRPC_FOREVER;   // he cancels
    if (request.kind == TPRPC_STORE_GET && tpr_store_server_full(c))
        status = tpr_store_error(c->store, &error, TPRPC_ERROR_LIMIT, "%d gets of this process wait already",
                                 (int)TPR_STORE_WAITS);
    else status = tpr_store_submit(c->store, c->store->context, c->store->home->index, &request, tpr_store_served, c,
                                   &op,
                                   &error);
    if (status != TPRPC_OK) return tpr_store_server_reply(c, frame->id, status, tpr_base_bytes_none(), &error);
    op->id = frame->id;   // it completes as deferred work, not before this
    tpr_base_list_add(&c->ops, &op->served);
    op->counted = TPR_ATOMIC_LOAD(&op->finished) != 0;
    if (op->counted) c->busy++;
    else c->waits++;
    return true;
}

static void tpr_store_server_cancel(tpr_store_conn *c, uint64_t id) {
    for (tpr_base_list *i = c->ops.next; i != &c->ops; i = i->next) {
        tprpc_store_op *op = TPR_CONTAINER(i, tprpc_store_op, served);
        if (op->id != id) continue;
        tpr_store_cancel(c->store, op);
        return;
    }
}

// The first bytes have come: is it a client, and one of this user's? False: it was dropped.
static bool tpr_store_server_meet(tpr_store_conn *c) {
    tprpc_error error = TPR_ZERO;
    tprpc_status status = tpr_store_conn_hello(c, &error);
    char peer[64];
    if (status == TPRPC_PENDING) return true;
    if (c->known) {
        c->store->unknown--;
        tpr_base_list_remove(&c->node);
        tpr_base_list_add(&c->store->conns, &c->node);
        tpr_timer_cancel(&c->store->home->wheel, &c->timer);
        tpr_store_conn_greet(c, TPRPC_OK);
        return true;
    }
    TPR_LOG(&c->store->context->env.logger, TPRPC_LOG_WARNING, "store", tpr_store_conn_peer(c, peer, sizeof peer),
            "a connection is refused: %s", error.text);
    tpr_store_conn_greet(c, status);
    tpr_store_server_drop(c, status);
    return false;
}

// Serves what has come, as long as replies are taken. False: the connection was dropped.
static bool tpr_store_server_read(tpr_store_conn *c) {
    tpr_wire_store_frame frame;
    tprpc_status status = TPRPC_PENDING;
    if (!c->known && !tpr_store_server_meet(c)) return false;
    if (!c->known) return true;
    while (c->busy < (uint32_t)TPR_STORE_BUSY && c->out.size - c->out.at < (size_t)TPR_STORE_UNSENT) {
        status = tpr_store_conn_next(c, &frame);
        if (status != TPRPC_OK) break;
        if (frame.type == TPR_WIRE_STORE_CANCEL) tpr_store_server_cancel(c, frame.id);
        else if (frame.type != TPR_WIRE_STORE_REQUEST) status = TPRPC_ERROR_PROTOCOL;
        else if (!tpr_store_server_request(c, &frame)) status = TPRPC_ERROR_MEMORY;
        if (status != TPRPC_OK) break;
    }
    if (status == TPRPC_OK || status == TPRPC_PENDING) return true;
    TPR_LOG(&c->store->context->env.logger, TPRPC_LOG_WARNING, "store", "", "a client of %.100s is dropped: %s",
            c->store->name, tprpc_status_name(status));
    tpr_store_server_drop(c, status);
    return false;
}

TPR_COLD static void tpr_store_server_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    tpr_store_conn *c = TPR_CONTAINER(owner, tpr_store_conn, owner);
    (void)error;
    if (events & (uint32_t)TPRPC_EVENT_SEND) tpr_store_conn_flush(c);
    if (!tpr_store_server_read(c)) return;
    if (events & (uint32_t)TPRPC_EVENT_LOST) tpr_store_server_drop(c, TPRPC_ERROR_PEER);
}

TPR_COLD static void tpr_store_server_silent(tprpc_work *work) {
    tpr_store_conn *c = TPR_CONTAINER(work, tpr_store_conn, timer);
    TPR_LOG(&c->store->context->env.logger, TPRPC_LOG_WARNING, "store", "", "%.100s: a connection said nothing and is "
            "dropped",
            c->store->name);
    tpr_store_server_drop(c, TPRPC_ERROR_TIMEOUT);
}

TPR_COLD static void tpr_store_server_accepted(tprpc_listen_owner *owner, void *conn) {
    tprpc_store *store = TPR_CONTAINER(owner, tprpc_store, listen_owner);
    tpr_store_conn *c = NULL;
    // The one that has been silent for longest makes room: who says nothing keeps nobody out.
    if (store->unknown >= store->context->limits.handshakes && !tpr_base_list_empty(&store->strangers)) {
        TPR_LOG(&store->context->env.logger, TPRPC_LOG_WARNING, "store", "", "%.100s: a silent connection is dropped, "
                "too many are", store->name);
        tpr_store_server_drop(TPR_CONTAINER(store->strangers.next, tpr_store_conn, node), TPRPC_ERROR_LIMIT);
    }
    if (store->unknown < store->context->limits.handshakes && store->conn_count < store->context->limits.pipes)
        c = tpr_store_conn_new(store, tpr_store_server_event);
    if (!c) {
        TPR_LOG(&store->context->env.logger, TPRPC_LOG_WARNING, "store", "", "%.100s: too many connections",
                store->name);
        store->transport->disconnect(conn, TPRPC_ERROR_LIMIT);
        return;
    }
    c->conn = conn;
    c->timer.run = tpr_store_server_silent;
    store->conn_count++;
    store->unknown++;
    tpr_base_list_add(&store->strangers, &c->node);
    tpr_loop_timer(store->home, &c->timer, tpr_loop_clock(store->home) + TPR_STORE_HELLO_US);
    store->transport->own(conn, &c->owner);
    tpr_store_server_read(c);   // what came before it was ours
}

TPR_COLD static void tpr_store_server_shut(tprpc_store *store) {
    store->transport->unlisten(store->listener);
    while (!tpr_base_list_empty(&store->strangers))
        tpr_store_server_drop(TPR_CONTAINER(store->strangers.next, tpr_store_conn, node), TPRPC_ERROR_CLOSED);
    while (!tpr_base_list_empty(&store->conns))
        tpr_store_server_drop(TPR_CONTAINER(store->conns.next, tpr_store_conn, node), TPRPC_ERROR_CLOSED);
}

static const tpr_store_kind tpr_store_server = {tpr_store_local_submit, tpr_store_local_cancel, NULL, NULL,
                                                tpr_store_server_shut, tpr_store_nothing};

// ---- tcp: a client

// Ends what waits for the server.
static void tpr_store_client_fail(tprpc_store *store, const tprpc_error *error) {
    for (int sent = 0; sent < 2; sent++) {
        tpr_base_list *list = sent && store->conn ? &store->conn->ops : &store->unsent;
        while (!tpr_base_list_empty(list)) {
            tprpc_store_op *op = TPR_CONTAINER(list->next, tprpc_store_op, link);
            tpr_base_list_remove(&op->link);
            tpr_store_finish(op, error->status, NULL, 0, error);
        }
    }
}

static void tpr_store_client_hang_up(tprpc_store *store, tprpc_status cause) {
    if (store->conn) tpr_store_conn_free(store->conn, cause);
    store->conn = NULL;
    tpr_timer_cancel(&store->home->wheel, &store->timer);
}

// An attempt failed: the next one follows, until the time is over or there is no use in it (`last`).
static void tpr_store_client_retry(tprpc_store *store, const tprpc_error *error, bool last) {
    int64_t now = tpr_loop_clock(store->home);
    tprpc_error late = *error;
    tpr_store_client_hang_up(store, error->status);
    tpr_store_why(store, error->text);
    store->state = last || now >= store->deadline_us ? TPR_STORE_IDLE : TPR_STORE_PAUSED;
    if (store->state == TPR_STORE_PAUSED) {
        int64_t pause = store->retry_us;
        store->retry_us = pause * 2 < TPR_STORE_RETRY_MOST_US ? pause * 2 : (int64_t)TPR_STORE_RETRY_MOST_US;
        tpr_store_set_timer(store, now + pause < store->deadline_us ? now + pause : store->deadline_us);
        return;
    }
    if (!last)
        tpr_store_error(store, &late, TPRPC_ERROR_UNREACHABLE, "no server after %lld ms: %.110s",
                        (long long)store->timeout_ms, error->text);
    late.os_code = error->os_code;
    tpr_store_client_fail(store, &late);
}

static void tpr_store_client_send(tprpc_store *store) {
    while (store->state == TPR_STORE_READY && !tpr_base_list_empty(&store->unsent)) {
        tprpc_store_op *op = TPR_CONTAINER(store->unsent.next, tprpc_store_op, link);
        const tprpc_store_request *r = &op->request;
        tpr_wire_store_frame frame = TPR_ZERO;
        frame.type = TPR_WIRE_STORE_REQUEST;
        frame.kind = (uint8_t)r->kind;
        frame.flags = (uint8_t)((op->nowait ? TPR_WIRE_STORE_NOWAIT : 0) | (r->expected ? TPR_WIRE_STORE_EXPECTED : 0));
        frame.id = op->id = ++store->last_id;
        frame.delta = r->delta;
        frame.key = tpr_store_key(op);
        frame.value = tpr_store_bytes(r->value, r->value_size);
        frame.expected = tpr_store_bytes(r->expected, r->expected_size);
        tpr_base_list_remove(&op->link);
        if (tpr_store_conn_put(store->conn, &frame)) tpr_base_list_add(&store->conn->ops, &op->link);
        else tpr_store_finish(op, TPRPC_ERROR_MEMORY, NULL, 0, NULL);
    }
}

// Whether a reply shows what its operation has to: callbacks read a sum, or a value that is there.
static bool tpr_store_client_fits(const tprpc_store_op *op, const tpr_wire_store_frame *frame) {
    bool present = (frame->flags & TPR_WIRE_STORE_PRESENT) != 0;
    if (frame->status != (uint32_t)TPRPC_OK) return true;
    switch (op->request.kind) {
    case TPRPC_STORE_SET: return !present;
    case TPRPC_STORE_GET: return present;
    case TPRPC_STORE_ADD: return present && frame->value.size == sizeof(int64_t);
    case TPRPC_STORE_DELETE: return present && frame->value.size == 1;
    default: return true;
    }
}

// Takes the replies that have come. Returns PENDING, or why there can be no more.
static tprpc_status tpr_store_client_read(tprpc_store *store) {
    tpr_wire_store_frame frame;
    tprpc_status status;
    while ((status = tpr_store_conn_next(store->conn, &frame)) == TPRPC_OK) {
        tprpc_store_op *op = NULL;
        tprpc_error error;
        if (frame.type != TPR_WIRE_STORE_REPLY) return TPRPC_ERROR_PROTOCOL;
        for (tpr_base_list *i = store->conn->ops.next; i != &store->conn->ops && !op; i = i->next)
            if (TPR_CONTAINER(i, tprpc_store_op, link)->id == frame.id) op = TPR_CONTAINER(i, tprpc_store_op, link);
        if (!op) continue;   // cancelled meanwhile
        if (!tpr_store_client_fits(op, &frame)) return TPRPC_ERROR_PROTOCOL;
        tpr_base_list_remove(&op->link);
        tprpc_error_set(&error, (tprpc_status)frame.status, frame.os_code, "%.*s", (int)frame.text.size,
                        (const char *)frame.text.data);
        tpr_store_finish(op, error.status, (frame.flags & TPR_WIRE_STORE_PRESENT) ? frame.value.data : NULL,
                           frame.value.size, &error);
    }
    return status;
}

static void tpr_store_client_meet(tprpc_store *store) {
    tprpc_error error = TPR_ZERO;
    tprpc_status status = tpr_store_conn_hello(store->conn, &error);
    if (status == TPRPC_PENDING) return;
    if (status != TPRPC_OK) {
        tpr_store_client_retry(store, &error, status != TPRPC_ERROR_PEER);   // who is gone refused nothing
        return;
    }
    tpr_timer_cancel(&store->home->wheel, &store->timer);
    tpr_store_why(store, "");
    store->state = TPR_STORE_READY;
    tpr_store_client_send(store);
}

TPR_COLD static void tpr_store_client_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    tprpc_store *store = TPR_CONTAINER(owner, tpr_store_conn, owner)->store;
    tprpc_status status = TPRPC_PENDING;
    bool lost = (events & (uint32_t)TPRPC_EVENT_LOST) != 0;
    tprpc_error unknown = TPR_ZERO;
    if (lost && !error) {
        tprpc_error_set(&unknown, TPRPC_ERROR_PEER, 0, "the connection was lost");
        error = &unknown;
    }
    if (store->state == TPR_STORE_CONNECTING && (events & (uint32_t)TPRPC_EVENT_OPEN)) {
        int64_t until = tpr_loop_clock(store->home) + TPR_STORE_HELLO_US;
        store->state = TPR_STORE_GREETING;
        tpr_store_set_timer(store, until < store->deadline_us ? until : store->deadline_us);
        tpr_store_conn_greet(store->conn, TPRPC_OK);
    }
    if (store->state == TPR_STORE_GREETING) tpr_store_client_meet(store);
    if (store->state == TPR_STORE_READY) {
        if (events & (uint32_t)TPRPC_EVENT_SEND) tpr_store_conn_flush(store->conn);
        status = tpr_store_client_read(store);
    } else if (lost && store->conn) {
        tpr_store_client_retry(store, error, false);
    }
    if (store->state != TPR_STORE_READY || (status == TPRPC_PENDING && !lost)) return;
    tpr_store_error(store, &store->lost, lost ? TPRPC_ERROR_PEER : status, "lost its server: %.130s",
                    lost ? error->text : tprpc_status_name(status));
    if (lost) store->lost.os_code = error->os_code;
    store->state = TPR_STORE_LOST;
    tpr_store_client_fail(store, &store->lost);
    tpr_store_client_hang_up(store, TPRPC_ERROR_PEER);
}

static void tpr_store_client_connect(tprpc_store *store) {
    tprpc_error error = TPR_ZERO;
    void *conn = NULL;
    store->state = TPR_STORE_CONNECTING;
    store->conn = tpr_store_conn_new(store, tpr_store_client_event);
    if (!store->conn) {
        tprpc_error_set(&error, TPRPC_ERROR_MEMORY, 0, "no memory for a connection");
        tpr_store_client_retry(store, &error, false);
        return;
    }
    tpr_store_set_timer(store, store->deadline_us);
    if (store->transport->connect(store->instance, store->address, 0, &store->conn->owner, &conn, &error) == TPRPC_OK)
        store->conn->conn = conn;
    else tpr_store_client_retry(store, &error, false);
}

TPR_COLD static void tpr_store_client_timer(tprpc_work *work) {
    tprpc_store *store = TPR_CONTAINER(work, tprpc_store, timer);
    tprpc_error error;
    if (store->state == TPR_STORE_PAUSED) {
        tpr_store_client_connect(store);
        return;
    }
    tprpc_error_set(&error, TPRPC_ERROR_TIMEOUT, 0, "%.80s %s", store->address,
                    store->state == TPR_STORE_GREETING ? "accepts connections and says nothing" : "does not answer");
    tpr_store_client_retry(store, &error, false);
}

TPR_COLD static void tpr_store_client_begin(tprpc_store *store, tprpc_store_op *op, bool cancelled) {
    tpr_wire_store_frame frame = TPR_ZERO;
    tpr_base_list_remove(&op->link);
    if (cancelled) {
        frame.type = TPR_WIRE_STORE_CANCEL;
        frame.id = op->id;
        if (op->id && store->state == TPR_STORE_READY) tpr_store_conn_put(store->conn, &frame);   // else he finds out
        tpr_store_finish(op, TPRPC_ERROR_CANCELLED, NULL, 0, NULL);
    } else if (store->state == TPR_STORE_LOST) {
        tpr_store_finish(op, store->lost.status, NULL, 0, &store->lost);
    } else {
        tpr_base_list_add(&store->unsent, &op->link);
    }
}

TPR_COLD static void tpr_store_client_step(tprpc_store *store) {
    tpr_store_client_send(store);
    if (store->state != TPR_STORE_IDLE || tpr_base_list_empty(&store->unsent)) return;
    store->deadline_us = tpr_context_deadline(tpr_loop_clock(store->home), store->timeout_ms);
    store->retry_us = TPR_STORE_RETRY_LEAST_US;
    tpr_store_client_connect(store);
}

TPR_COLD static void tpr_store_client_shut(tprpc_store *store) {
    while (store->conn && !tpr_base_list_empty(&store->conn->ops)) tpr_base_list_remove(store->conn->ops.next);
    tpr_store_client_hang_up(store, TPRPC_ERROR_CLOSED);
    store->state = TPR_STORE_LOST;
}

static const tpr_store_kind tpr_store_client = {tpr_store_queue, tpr_store_queue, tpr_store_client_begin,
                                                tpr_store_client_step, tpr_store_client_shut, tpr_store_nothing};

// ---- tcp: opening

// Finds the transport, and the numeric address to use, so that no name is looked up later, within a poll.
static tprpc_status tpr_store_tcp_address(tprpc_store *store, tprpc_error *error) {
    char scheme[16], host[256];
    const char *at = tpr_transport_split(store->name, scheme), *colon = strrchr(at, ':'), *fault;
    tpr_os_address address;
    tpr_context_backend *found = NULL;
    tprpc_context *ctx = store->context;
    size_t length = colon ? (size_t)(colon - at) : 0;
    int64_t port = 0;
    for (uint32_t i = 0; i < ctx->backend_count; i++)
        if (ctx->backends[i].backend->transport && strcmp(ctx->backends[i].backend->name, scheme) == 0)
            found = &ctx->backends[i];
    if (!found || !found->opened)      // one that the user's list leaves to no pipe still serves
        return tpr_store_error(store, error, TPRPC_ERROR_UNSUPPORTED, "the transport %s cannot be used: %s", scheme,
                               found ? found->why : "it was not built in");
    store->transport = found->backend->transport;
    store->instance = found->instances[store->home->index];
    if (!length || length >= sizeof host || !tpr_store_number(tpr_store_bytes(colon + 1, strlen(colon + 1)), &port) ||
        port < 1 || port > 65535)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "store %.100s is not tcp://host:port", store->name);
    if (at[0] == '[' && length > 2 && at[length - 1] == ']') {
        at++;
        length -= 2;
    }
    memcpy(host, at, length);
    host[length] = 0;
    fault = tpr_os_resolve(host, (uint16_t)port, &address);
    if (fault)
        return tpr_store_error(store, error, TPRPC_ERROR_UNREACHABLE, "looking up its host: %s", fault);
    tpr_os_address_text(&address, true, store->address, sizeof store->address);
    return TPRPC_OK;
}

static tprpc_status tpr_store_tcp_open(tprpc_store *store, bool serve, tprpc_error *error) {
    tprpc_status status = tpr_store_tcp_address(store, error);
    if (status != TPRPC_OK) return status;
    store->kind = serve ? &tpr_store_server : &tpr_store_client;
    store->timer.run = tpr_store_client_timer;
    store->listen_owner.accepted = tpr_store_server_accepted;
    tpr_loop_enter(store->home);
    if (!store->insecure && store->transport->public_address(store->instance, store->address))
        status = tpr_store_error(store, error, TPRPC_ERROR_UNSUPPORTED, "not on loopback: that needs a `secret` (TLS, "
                                 "which is not built in) or `insecure`");
    else if (serve)
        status = store->transport->listen(store->instance, store->address, &store->listen_owner, &store->listener,
                                          error);
    tpr_loop_leave(store->home);
    return status;
}

// ---- file: an append-only log, which every process that has it open replays into a map of its own
//
// It is read without the lock and written under it. A record that ends beyond the file's end is one that is being
// written, or whose writer died: readers leave it, the next writer cuts it off.

#ifndef TPRPC_NO_FILES
static const char *tpr_store_file_path(const tprpc_store *store) { return store->name + 7; }

// Replays what was appended, at most TPR_STORE_FILE_TURN bytes: PENDING when there is more. What is no record is an
// error under the lock; without it, it may be one that is being written.
static tprpc_status tpr_store_file_read(tprpc_store *store, bool locked, tprpc_error *error) {
    const char *path = tpr_store_file_path(store);
    for (size_t total = 0; total < (size_t)TPR_STORE_FILE_TURN;) {
        tpr_wire_record record;
        int whole;
        int64_t got = tpr_os_file_read(store->fd, store->buffer, TPR_STORE_FILE_BUFFER, store->offset);
        size_t at = 0, size = got < 0 ? 0 : (size_t)got, magic = TPR_WIRE_RECORD_MAGIC;
        if (got < 0) return tpr_base_os_error(error, errno, "reading the store file", path);
        if (store->offset == 0) {
            if (memcmp(store->buffer, tpr_wire_record_magic, size < magic ? size : magic) != 0)
                return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "%.180s is not a store file", path);
            if (size < magic) return TPRPC_OK;
            at = magic;
        }
        while ((whole = tpr_wire_record_read(store->buffer + at, size - at, &record)) > 0 &&
               tpr_store_map_write(&store->map, record.key, record.remove ? tpr_base_bytes_none() : record.value))
            at += record.size;
        store->offset += (int64_t)at;
        store->damaged = whole < 0;
        if (whole > 0) return tpr_store_error(store, error, TPRPC_ERROR_MEMORY, "no memory for what it holds");
        if (whole < 0 && locked)
            return tpr_store_error(store, error, TPRPC_ERROR_PROTOCOL, "it is damaged at byte %lld",
                                   (long long)store->offset);
        if (whole < 0 || size < (size_t)TPR_STORE_FILE_BUFFER) return TPRPC_OK;
        total += size;
    }
    return TPRPC_PENDING;
}

static void tpr_store_file_unlock(tprpc_store *store) { tpr_os_file_lock(store->fd, false); }

// Locks the file, reads what is new and cuts off what a dead writer left. PENDING: not now.
static tprpc_status tpr_store_file_lock(tprpc_store *store, tprpc_error *error) {
    const char *path = tpr_store_file_path(store);
    if (tpr_os_file_lock(store->fd, true) != 0)
        return errno == EAGAIN ? TPRPC_PENDING : tpr_base_os_error(error, errno, "locking the store file", path);
    tprpc_status status = tpr_store_file_read(store, true, error);
    int64_t size = status == TPRPC_OK ? tpr_os_file_size(store->fd) : 0;
    if (status == TPRPC_OK && size < store->offset)
        status = size < 0 ? tpr_base_os_error(error, errno, "asking for the size of the store file", path)
                          : tpr_store_error(store, error, TPRPC_ERROR_PROTOCOL, "it was cut short");
    else if (status == TPRPC_OK && size > store->offset && tpr_os_file_truncate(store->fd, store->offset) != 0)
        status = tpr_base_os_error(error, errno, "repairing the store file", path);
    if (status == TPRPC_OK && store->offset == 0 &&
        tpr_os_file_write(store->fd, tpr_wire_record_magic, TPR_WIRE_RECORD_MAGIC, 0) != 0)
        status = tpr_base_os_error(error, errno, "writing the store file", path);
    if (status == TPRPC_OK && store->offset == 0) store->offset = TPR_WIRE_RECORD_MAGIC;
    if (status != TPRPC_OK) tpr_store_file_unlock(store);
    return status;
}

static tpr_base_bytes tpr_store_file_held(tprpc_store *store, tprpc_store_op *op) {
    tpr_store_entry *entry = tpr_store_map_find(&store->map, tpr_store_key(op), false);
    return entry ? tpr_store_bytes(entry->value, entry->value_size) : tpr_base_bytes_none();
}

// Does what changes the file, under its lock.
static void tpr_store_file_write(tprpc_store *store, tprpc_store_op *op) {
    tpr_store_outcome outcome;
    tprpc_error error = TPR_ZERO;
    tprpc_status status = tpr_store_judge(op, tpr_store_file_held(store, op), &outcome, &error);
    tpr_base_list_remove(&op->link);
    if (status == TPRPC_OK && outcome.write) {
        size_t size = tpr_wire_record_write(tpr_store_key(op), outcome.value, store->buffer);
        if (tpr_os_file_write(store->fd, store->buffer, size, store->offset) != 0) {
            status = tpr_base_os_error(&error, errno, "writing the store file", tpr_store_file_path(store));
            tpr_os_file_truncate(store->fd, store->offset);   // should it fail: the next writer does it
        }
    }
    tpr_store_finish(op, status, outcome.shown.data, outcome.shown.size, &error);
}

// Shows a get its value, or that there is none. False: it waits.
static bool tpr_store_file_get(tprpc_store *store, tprpc_store_op *op) {
    tpr_base_bytes held = tpr_store_file_held(store, op);
    tprpc_error error;
    if (!held.data && !op->nowait) return false;
    tpr_base_list_remove(&op->link);
    if (!held.data) tpr_store_late(op, 0, &error);
    tpr_store_finish(op, held.data ? TPRPC_OK : TPRPC_ERROR_TIMEOUT, held.data, held.size, &error);
    return true;
}

static void tpr_store_file_fail(tprpc_store *store, const tprpc_error *error) {
    for (int i = 0; i < 2; i++) {
        tpr_base_list *list = i ? &store->active : &store->waiting;
        while (!tpr_base_list_empty(list)) {
            tprpc_store_op *op = TPR_CONTAINER(list->next, tprpc_store_op, link);
            tpr_base_list_remove(&op->link);
            tpr_store_finish(op, error->status, NULL, 0, error);
        }
    }
}

// Does what was asked, in order, as far as the file's lock is to be had. PENDING: it is another's.
static tprpc_status tpr_store_file_do(tprpc_store *store, tprpc_error *error) {
    tprpc_status status = tpr_store_file_read(store, false, error);
    bool locked = false;
    if (status == TPRPC_OK && store->damaged && (status = tpr_store_file_lock(store, error)) == TPRPC_OK) locked = true;
    while (status == TPRPC_OK && !tpr_base_list_empty(&store->active)) {
        tprpc_store_op *op = TPR_CONTAINER(store->active.next, tprpc_store_op, link);
        if (op->request.kind == TPRPC_STORE_GET) {
            if (tpr_store_file_get(store, op)) continue;
            tpr_base_list_remove(&op->link);
            tpr_base_list_add(&store->waiting, &op->link);
            continue;
        }
        if (!locked && (status = tpr_store_file_lock(store, error)) != TPRPC_OK) break;
        locked = true;
        tpr_store_file_write(store, op);
        status = tpr_store_file_read(store, true, error);
    }
    if (locked) tpr_store_file_unlock(store);
    for (tpr_base_list *i = store->waiting.next, *next; i != &store->waiting; i = next) {
        next = i->next;
        tpr_store_file_get(store, TPR_CONTAINER(i, tprpc_store_op, link));
    }
    return status;
}

TPR_COLD static void tpr_store_file_step(tprpc_store *store) {
    int64_t offset = store->offset, now = tpr_loop_clock(store->home);
    tprpc_error error = TPR_ZERO;
    tprpc_status status = tpr_store_file_do(store, &error);
    if (status != TPRPC_OK && status != TPRPC_PENDING) tpr_store_file_fail(store, &error);
    bool active = !tpr_base_list_empty(&store->active), news = store->offset != offset;
    int64_t *pause = active ? &store->wait_us : &store->look_us;
    tpr_store_why(store, active ? "another process has locked the file" : "");
    if (!active) store->wait_us = TPR_STORE_LOCK_LEAST_US;
    if (news) store->look_us = TPR_STORE_LOOK_LEAST_US;
    if (!active && tpr_base_list_empty(&store->waiting)) return;
    tpr_store_set_timer(store, now + (active && news ? 0 : *pause));
    if (!news) *pause *= 2;
    if (store->wait_us > TPR_STORE_LOCK_MOST_US) store->wait_us = TPR_STORE_LOCK_MOST_US;
    if (store->look_us > TPR_STORE_LOOK_MOST_US) store->look_us = TPR_STORE_LOOK_MOST_US;
}

TPR_COLD
static void tpr_store_file_timer(tprpc_work *work) { tpr_store_file_step(TPR_CONTAINER(work, tprpc_store, timer)); }

TPR_COLD static void tpr_store_file_begin(tprpc_store *store, tprpc_store_op *op, bool cancelled) {
    tpr_base_list_remove(&op->link);
    if (cancelled) tpr_store_finish(op, TPRPC_ERROR_CANCELLED, NULL, 0, NULL);
    else tpr_base_list_add(&store->active, &op->link);
    store->look_us = TPR_STORE_LOOK_LEAST_US;
}

TPR_COLD static void tpr_store_file_shut(tprpc_store *store) { tpr_timer_cancel(&store->home->wheel, &store->timer); }

TPR_COLD static void tpr_store_file_end(tprpc_store *store) {
    tpr_os_close(store->fd);
    tpr_base_free(tpr_store_memory(store), store->buffer, TPR_STORE_FILE_BUFFER, (uint32_t)TPR_STORE_TAG);
}

static const tpr_store_kind tpr_store_file = {tpr_store_queue, tpr_store_queue, tpr_store_file_begin,
                                              tpr_store_file_step,
                                              tpr_store_file_shut, tpr_store_file_end};

static tprpc_status tpr_store_file_open(tprpc_store *store, tprpc_error *error) {
    const char *path = tpr_store_file_path(store);
    tprpc_status status;
    if (!path[0]) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "store %.100s is not file://path", store->name);
    store->fd = tpr_os_file_open(path);
    if (store->fd < 0 && (errno == EINVAL || errno == EISDIR || errno == ENXIO))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, errno, "%.180s is not a store file", path);
    if (store->fd < 0) return tpr_base_os_error(error, errno, "opening the store file", path);
    store->buffer = (uint8_t *)tpr_base_alloc(tpr_store_memory(store), TPR_STORE_FILE_BUFFER, 64,
                                              (uint32_t)TPR_STORE_TAG);
    store->kind = &tpr_store_file;
    store->timer.run = tpr_store_file_timer;
    store->look_us = TPR_STORE_LOOK_LEAST_US;
    store->wait_us = TPR_STORE_LOCK_LEAST_US;
    status = store->buffer ? tpr_store_file_read(store, false, error)
                           : tpr_store_error(store, error, TPRPC_ERROR_MEMORY, "no memory for a buffer");
    if (status == TPRPC_OK || status == TPRPC_PENDING) return TPRPC_OK;
    tpr_store_file_end(store);
    return status;
}
#endif

// ---- env

// Reads a number from the environment.
static tprpc_status tpr_store_env_number(const char *name, int64_t least, int64_t most, int32_t *out,
                                         tprpc_error *error) {
    const char *text = tpr_os_env(name);
    int64_t value = 0;
    if (!text || !text[0]) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "env://: %s is not set", name);
    if (!tpr_store_number(tpr_store_bytes(text, strlen(text)), &value) || value < least || value > most)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "env://: %s is \"%.60s\", not a number from %lld to %lld",
                               name,
                               text, (long long)least, (long long)most);
    *out = (int32_t)value;
    return TPRPC_OK;
}

// What env:// stands for: the rank, the size of the world, and the tcp:// URL, which rank 0 serves. Any pointer may be
// NULL.
static tprpc_status tpr_store_env(int32_t *rank, int32_t *world_size, char *url, size_t size, tprpc_error *error) {
    const char *host = tpr_os_env("MASTER_ADDR");
    int32_t port = 0, at = 0, of = 0;
    tprpc_status status;
    if (!host || !host[0]) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "env://: MASTER_ADDR is not set");
    status = tpr_store_env_number("MASTER_PORT", 1, 65535, &port, error);
    if (status == TPRPC_OK) status = tpr_store_env_number("WORLD_SIZE", 1, INT32_MAX, &of, error);
    if (status == TPRPC_OK) status = tpr_store_env_number("RANK", 0, of - 1, &at, error);
    if (status != TPRPC_OK) return status;
    if (rank) *rank = at;
    if (world_size) *world_size = of;
    if (!url) return TPRPC_OK;
    bool bare = strchr(host, ':') && host[0] != '[';
    if ((size_t)snprintf(url, size, bare ? "tcp://[%s]:%d" : "tcp://%s:%d", host, port) < size) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "env://: MASTER_ADDR is longer than a host's name");
}

// What to do when rank 0 cannot listen on MASTER_PORT because a launcher's own store does, whose protocol is another.
static void tpr_store_env_taken(tprpc_error *error) {
    const char *own = tpr_os_env("TORCHELASTIC_USE_AGENT_STORE");
    tprpc_error before;
    if (!error || error->os_code != EADDRINUSE || !own || strcmp(own, "True") != 0) return;
    before = *error;
    tprpc_error_set(error, before.status, before.os_code,
                    "%.110s: torchrun serves a store of its own there; give all workers another MASTER_PORT, or a "
                    "tcp:// with a free port instead of env://", before.text);
}

// ---- opening and closing

static void tpr_store_free(tprpc_store *store) {
    tpr_store_map_clear(&store->map);
    tpr_base_free(tpr_store_memory(store), store, store->bytes, (uint32_t)TPR_STORE_TAG);
}

TPR_COLD static void tpr_store_ended(tpr_loop_task *task) {
    tprpc_store *store = TPR_CONTAINER(task, tprpc_store, task);
    store->kind->end(store);
    tpr_base_list_remove(&store->object.node);
    tpr_loop_notify(store->home);
    tpr_store_free(store);
}

static void tpr_store_user_close(tpr_loop_task *task) {
    tprpc_store *store = TPR_CONTAINER(task, tprpc_store, task);
    store->table->close(store->user);
}

// The last reference was given back.
TPR_COLD static void tpr_store_end_run(tprpc_work *work) {
    tprpc_store *store = TPR_CONTAINER(work, tprpc_store, end_work);
    store->task.run = tpr_store_user_close;
    store->task.done = tpr_store_ended;
    if (store->table && store->table->close) tpr_loop_post_place(store->home, &store->task);
    else tpr_store_ended(&store->task);
}

// Closes a store once, under its home loop's lock: what is pending ends with CLOSED, or, of a user's, is asked to.
TPR_COLD static void tpr_store_shut(tpr_loop_object *object) {
    tprpc_store *store = TPR_CONTAINER(object, tprpc_store, object);
    tpr_base_list ended, *lists[2];
    if (store->closed) return;
    store->kind->shut(store);
    tpr_base_list_init(&ended);
    lists[0] = &store->ops;
    lists[1] = &store->queue;
    tpr_os_lock_take(&store->lock);
    store->closed = true;
    for (int i = 0; i < 2; i++) {
        for (tpr_base_list *node = lists[i]->next, *next; node != lists[i]; node = next) {
            tprpc_store_op *op = TPR_CONTAINER(node, tprpc_store_op, node);
            bool cancelled = op->cause != TPRPC_OK;
            next = node->next;
            if (!cancelled) op->cause = TPRPC_ERROR_CLOSED;
            tpr_base_list_remove(&op->link);
            if (!store->table) tpr_store_end(op, TPRPC_ERROR_CANCELLED, tpr_base_bytes_none(), NULL, &ended);
            else if (!cancelled) store->kind->cancel(store, op, &ended);
        }
    }
    tpr_os_lock_give(&store->lock);
    tpr_store_flush(&ended);
    tpr_store_release(store);
}

static tprpc_status tpr_store_open_kind(tprpc_store *store, const tprpc_store_desc *desc, bool serve,
                                        tprpc_error *error) {
    if (desc->table) {
        store->kind = &tpr_store_users;
        store->table = desc->table;
        store->user = desc->user;
        return TPRPC_OK;
    }
    if (tpr_base_starts_with(store->name, "local://")) {
        store->kind = &tpr_store_local;
        return TPRPC_OK;
    }
    if (tpr_base_starts_with(store->name, "tcp://")) return tpr_store_tcp_open(store, serve, error);
    if (tpr_base_starts_with(store->name, "file://")) {
#ifndef TPRPC_NO_FILES
        return tpr_store_file_open(store, error);
#else
        return tpr_store_error(store, error, TPRPC_ERROR_UNSUPPORTED, "built with TPRPC_NO_FILES");
#endif
    }
    return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "\"%.100s\" is no store: tcp://host:port, file://path, "
                           "env:// and "
                           "local:// are", store->name);
}

static tprpc_store *tpr_store_new(tprpc_context *ctx, const tprpc_store_desc *desc, const char *name) {
    size_t length = strlen(name), bytes = sizeof(tprpc_store) + length + 1;
    tprpc_store *store = (tprpc_store *)tpr_base_new(&ctx->env.memory, bytes, (uint32_t)TPR_STORE_TAG);
    if (!store) return NULL;
    memcpy(store + 1, name, length + 1);
    store->name = (const char *)(store + 1);
    store->bytes = bytes;
    store->object.close = tpr_store_shut;
    store->context = ctx;
    store->home = &ctx->loops[0];
    store->timeout_ms = tpr_context_time(desc->timeout_ms, TPR_STORE_TIMEOUT_MS);
    store->insecure = desc->insecure;
    store->refs = 1;
    store->map.memory = store->map.index.memory = &ctx->env.memory;
    store->work.run = tpr_store_work_run;
    store->end_work.run = tpr_store_end_run;
    store->fd = -1;
    tpr_base_list_init(&store->ops);
    tpr_base_list_init(&store->queue);
    tpr_base_list_init(&store->conns);
    tpr_base_list_init(&store->strangers);
    tpr_base_list_init(&store->unsent);
    tpr_base_list_init(&store->active);
    tpr_base_list_init(&store->waiting);
    return store;
}

// ---- beginning an operation

static tprpc_status tpr_store_check(tprpc_store *store, const tprpc_store_request *r, tprpc_error *error) {
    const char *fault = tpr_base_name_fault(r->key, r->key ? strlen(r->key) : 0, TPR_WIRE_STORE_KEY);
    if (r->size != sizeof *r || r->kind < TPRPC_STORE_SET || r->kind > TPRPC_STORE_DELETE)
        return tpr_store_error(store, error, TPRPC_ERROR_INVALID, "a request of no known kind or size");
    if (fault)
        return tpr_store_error(store, error, TPRPC_ERROR_INVALID, "the key '%.60s' %s", r->key ? r->key : "", fault);
    if (r->value_size > (size_t)TPR_WIRE_STORE_VALUE || r->expected_size > (size_t)TPR_WIRE_STORE_VALUE)
        return tpr_store_error(store, error, TPRPC_ERROR_LIMIT, "the value of '%.60s' has more than %d bytes", r->key,
                               (int)TPR_WIRE_STORE_VALUE);
    if ((!r->value && r->value_size) || (!r->expected && r->expected_size))
        return tpr_store_error(store, error, TPRPC_ERROR_INVALID, "the value of '%.60s' is NULL", r->key);
    return TPRPC_OK;
}

// An operation with its own copy of what its kind needs of the request. A value of no bytes gets a pointer: NULL would
// mean that it is absent.
static tprpc_store_op *tpr_store_op_new(tprpc_store *store, tprpc_context *ctx, uint32_t loop,
                                        const tprpc_store_request *r) {
    bool compare = r->kind == TPRPC_STORE_COMPARE_SET, valued = compare || r->kind == TPRPC_STORE_SET;
    size_t key = strlen(r->key) + 1, value = valued ? r->value_size : 0, expected = compare ? r->expected_size : 0;
    size_t bytes = sizeof(tprpc_store_op) + key + value + expected;
    tprpc_store_op *op = (tprpc_store_op *)tpr_base_new(&ctx->env.memory, bytes, (uint32_t)TPR_STORE_TAG);
    if (!op) return NULL;
    char *at = (char *)(op + 1);
    op->bytes = bytes;
    op->store = store;
    op->context = ctx;
    op->loop = op->work.loop = op->timer.loop = op->cancel_work.loop = loop;
    op->timer.run = tpr_store_timer_run;
    op->request = *r;
    op->request.key = at;
    op->request.value = valued ? at + key : NULL;
    op->request.value_size = value;
    op->request.expected = compare && r->expected ? at + key + value : NULL;
    op->request.expected_size = expected;
    memcpy(at, r->key, key);
    tpr_base_copy(at + key, r->value, value);
    tpr_base_copy(at + key + value, r->expected, expected);
    tpr_base_list_init(&op->node);
    tpr_base_list_init(&op->link);
    tpr_base_list_init(&op->served);
    return op;
}

// Sets when an operation is given up: a get by its request, others after the time to reach the server and as much again
// for its answer.
static void tpr_store_op_time(tprpc_store *store, tprpc_store_op *op) {
    int64_t now = tprpc_now_us(op->context), deadline;
    if (op->wait_ms) op->request.deadline_us = tpr_context_deadline(now, op->wait_ms);
    int64_t wanted = op->request.deadline_us;
    bool get = op->request.kind == TPRPC_STORE_GET;
    op->begun_us = now;
    op->nowait = get && wanted != TPRPC_FOREVER && wanted <= now;
    if (get && !op->nowait) deadline = wanted == TPRPC_FOREVER ? INT64_MAX : wanted;
    else deadline = tpr_context_deadline(tpr_context_deadline(now, store->timeout_ms), store->timeout_ms);
    bool local = store->kind == &tpr_store_local || store->kind == &tpr_store_server;
    if (deadline == INT64_MAX || (local && (!get || op->nowait))) return;
    tprpc_defer_at(op->context, &op->timer, deadline);
}

static tprpc_status tpr_store_start(tprpc_store *store, tprpc_store_op *op, tprpc_error *error) {
    tpr_base_list ended;
    tpr_base_list_init(&ended);
    tpr_os_lock_take(&store->lock);
    if (store->closed) {
        tpr_os_lock_give(&store->lock);
        tpr_store_error(store, error, TPRPC_ERROR_CLOSED, "it was closed");
        tpr_store_op_free(op);
        return TPRPC_ERROR_CLOSED;
    }
    TPR_ATOMIC_ADD(&store->refs, 1u);
    tpr_base_list_add(&store->ops, &op->node);
    tpr_store_op_time(store, op);
    store->kind->submit(store, op, &ended);
    tpr_os_lock_give(&store->lock);
    tpr_store_flush(&ended);
    return TPRPC_OK;
}

// Begins an operation. Any thread, with or without the lock of a loop of ctx. `done` runs under the lock of that loop
// of ctx, later; the operation is freed after it, unless it sets `kept`. *out is for cancelling, until done runs.
TPR_COLD static tprpc_status tpr_store_submit(tprpc_store *store, tprpc_context *ctx, uint32_t loop,
                                     const tprpc_store_request *request, void (*done)(tprpc_store_op *op, void *user),
                                     void *user, tprpc_store_op **out, tprpc_error *error) {
    tprpc_status status = tpr_store_check(store, request, error);
    if (status != TPRPC_OK) return status;
    tprpc_store_op *op = tpr_store_op_new(store, ctx, loop, request);
    if (!op) return tpr_store_error(store, error, TPRPC_ERROR_MEMORY, "no memory for an operation");
    op->done = done;
    op->user = user;
    if (out) *out = op;
    return tpr_store_start(store, op, error);
}

// Asks that an operation end soon, with CANCELLED. Before its `done` runs.
static void tpr_store_cancel(tprpc_store *store, tprpc_store_op *op) {
    tpr_store_cancel_for(store, op, TPRPC_ERROR_CANCELLED);
}

// ---- asking and waiting

TPR_COLD static void tpr_store_callback_run(tpr_loop_task *task) {
    tprpc_store_op *op = TPR_CONTAINER(task, tprpc_store_op, task);
    op->callback(op->status, op->value, op->value_size, op->status == TPRPC_OK ? NULL : &op->error, op->user);
}

static void tpr_store_callback_over(tpr_loop_task *task) {
    tpr_store_op_free(TPR_CONTAINER(task, tprpc_store_op, task));
}

TPR_COLD static void tpr_store_callback(tprpc_store_op *op, void *user) {
    (void)user;
    op->kept = true;
    op->task.run = tpr_store_callback_run;
    op->task.done = tpr_store_callback_over;
    tpr_loop_post(&op->context->loops[op->loop], &op->task);
}

// Begins an operation whose outcome a user's `done` (NULL allowed) is shown on the callback thread.
// wait_ms: a get waits so long, instead of to the request's deadline; 0 for others.
static tprpc_status tpr_store_ask(tprpc_store *store, tprpc_store_request *request, int64_t wait_ms,
                                  tprpc_store_done done, void *user) {
    TPRPC_ASSERT(store && request->key);
    if (!store || !tpr_context_usable(store->context)) return TPRPC_ERROR_INVALID;
    request->size = (uint32_t)sizeof *request;
    tprpc_status status = tpr_store_check(store, request, NULL);
    if (status != TPRPC_OK) return status;
    tprpc_store_op *op = tpr_store_op_new(store, store->context, store->home->index, request);
    if (!op) return TPRPC_ERROR_MEMORY;
    op->wait_ms = wait_ms;
    op->done = done ? tpr_store_callback : NULL;
    op->callback = done;
    op->user = user;
    return tpr_store_start(store, op, NULL);
}

typedef struct tpr_store_waiter {
    tpr_loop *loop; bool done; tprpc_status status; void *out; size_t *out_size; tprpc_error *error;
} tpr_store_waiter;

static bool tpr_store_waiter_ready(void *arg) { return ((tpr_store_waiter *)arg)->done; }

TPR_COLD static void tpr_store_waiter_done(tprpc_store_op *op, void *user) {
    tpr_store_waiter *w = (tpr_store_waiter *)user;
    w->done = true;
    w->status = op->status;
    if (op->status != TPRPC_OK && w->error) *w->error = op->error;
    if (op->status == TPRPC_OK && w->out && op->value_size > *w->out_size)
        w->status = tpr_store_error(op->store, w->error, TPRPC_ERROR_LIMIT, "the value of '%.60s' has %zu bytes, not "
                                    "the %zu there is room for", op->request.key, op->value_size, *w->out_size);
    else if (op->status == TPRPC_OK && w->out) tpr_base_copy(w->out, op->value, op->value_size);
    if (op->status == TPRPC_OK && w->out_size) *w->out_size = op->value_size;
    tpr_loop_notify(w->loop);
}

// ---- public

TPR_COLD
TPRPC_API tprpc_status tprpc_store_open(tprpc_context *ctx, const tprpc_store_desc *desc, tprpc_store **out,
                                        tprpc_error *error) {
    char url[300];
    int32_t rank = -1;
    tprpc_status status = TPRPC_OK;
    TPRPC_ASSERT(ctx && desc && out);
    if (!ctx || !desc || !out) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_store_open: an argument "
                                                      "is NULL");
    *out = NULL;
    if (!tpr_context_usable(ctx)) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the context belongs to the "
                                                         "parent process");
    if (desc->table && (desc->table->size != sizeof *desc->table || !desc->table->submit))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "a store's table has another size, or no submit");
    if (!desc->table && !desc->url)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "a store needs a url or a table");
    const char *name = desc->table ? "(the user's)" : desc->url;
    if (!desc->table && strcmp(name, "env://") == 0) {
        status = tpr_store_env(&rank, NULL, url, sizeof url, error);
        if (status != TPRPC_OK) return status;
        name = url;
    }
    tprpc_store *store = tpr_store_new(ctx, desc, name);
    if (!store) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for the store %.100s", name);
    status = tpr_store_open_kind(store, desc, desc->serve || rank == 0, error);
    if (status != TPRPC_OK) {
        if (rank >= 0) tpr_store_env_taken(error);
        tpr_store_free(store);
        return status;
    }
    tpr_loop_enter(store->home);
    tpr_base_list_add(&store->home->objects, &store->object.node);
    tpr_loop_leave(store->home);
    *out = store;
    return TPRPC_OK;
}

TPR_COLD
TPRPC_API void tprpc_store_close(tprpc_store *store) {
    if (!store || !tpr_context_usable(store->context)) return;
    tpr_loop *home = store->home;
    tpr_loop_enter(home);
    tpr_store_shut(&store->object);
    tpr_loop_leave(home);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_store_set(tprpc_store *store, const char *key, const void *value, size_t size,
                                       tprpc_store_done done, void *user) {
    tprpc_store_request request = TPR_ZERO;
    request.kind = TPRPC_STORE_SET;
    request.key = key;
    request.value = value;
    request.value_size = size;
    return tpr_store_ask(store, &request, 0, done, user);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_store_get(tprpc_store *store, const char *key, int64_t timeout_ms, tprpc_store_done done,
                                       void *user) {
    tprpc_store_request request = TPR_ZERO;
    request.kind = TPRPC_STORE_GET;
    request.key = key;
    request.deadline_us = timeout_ms == TPRPC_FOREVER ? TPRPC_FOREVER : TPRPC_NOW;
    return tpr_store_ask(store, &request, timeout_ms > 0 ? timeout_ms : 0, done, user);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_store_add(tprpc_store *store, const char *key, int64_t delta, tprpc_store_done done,
                                       void *user) {
    tprpc_store_request request = TPR_ZERO;
    request.kind = TPRPC_STORE_ADD;
    request.key = key;
    request.delta = delta;
    return tpr_store_ask(store, &request, 0, done, user);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_store_compare_set(tprpc_store *store, const char *key, const void *expected,
                                               size_t expected_size, const void *value, size_t size,
                                               tprpc_store_done done, void *user) {
    tprpc_store_request request = TPR_ZERO;
    request.kind = TPRPC_STORE_COMPARE_SET;
    request.key = key;
    request.value = value;
    request.value_size = size;
    request.expected = expected;
    request.expected_size = expected_size;
    return tpr_store_ask(store, &request, 0, done, user);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_store_delete(tprpc_store *store, const char *key, tprpc_store_done done, void *user) {
    tprpc_store_request request = TPR_ZERO;
    request.kind = TPRPC_STORE_DELETE;
    request.key = key;
    return tpr_store_ask(store, &request, 0, done, user);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_store_wait(tprpc_store *store, const tprpc_store_request *request, int64_t timeout_ms,
                                        void *out, size_t *out_size, tprpc_error *error) {
    tpr_store_waiter w = TPR_ZERO;
    tprpc_store_op *op = NULL;
    tprpc_store_request r;
    TPRPC_ASSERT(store && request && (!out || out_size));
    if (!store || !request || (out && !out_size) || !tpr_context_usable(store->context))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_store_wait: an argument is NULL, or the parent "
                               "process's");
    tpr_loop *loop = w.loop = store->home;
    int64_t limit = timeout_ms == 0 ? store->timeout_ms : timeout_ms == TPRPC_NOW ? 0 : timeout_ms;
    bool look = timeout_ms == TPRPC_NOW && request->kind == TPRPC_STORE_GET;   // the server's answer is waited for
    r = *request;
    r.deadline_us = look ? TPRPC_NOW : TPRPC_FOREVER;
    w.out = out;
    w.out_size = out_size;
    w.error = error;
    tpr_loop_enter(loop);
    int64_t deadline = tpr_context_deadline(tpr_loop_clock(loop), look ? store->timeout_ms : limit);
    tprpc_status status = TPRPC_OK;
    if (tpr_loop_in_callback(loop) && loop->depth > loop->env->nesting)
        status = tpr_store_error(store, error, TPRPC_ERROR_LIMIT, "waits nested in callbacks too deep");
    if (status == TPRPC_OK)
        status = tpr_store_submit(store, store->context, loop->index, &r, tpr_store_waiter_done, &w, &op, error);
    if (status == TPRPC_OK && !tpr_loop_wait(loop, tpr_store_waiter_ready, &w, deadline)) {
        op->done = NULL;   // the waiter goes away, whenever the operation ends
        tpr_os_lock_take(&store->lock);
        status = tpr_store_late(op, limit, error);
        tpr_os_lock_give(&store->lock);
        tpr_store_cancel(store, op);
    } else if (status == TPRPC_OK) {
        status = w.status;
    }
    tpr_loop_leave(loop);
    return status;
}

TPR_COLD
TPRPC_API void tprpc_store_finish(tprpc_store_op *op, tprpc_status status, const void *value, size_t size,
                                  const tprpc_error *error) {
    TPRPC_ASSERT(op && (value || !size));
    if (op) tpr_store_finish(op, status, value, value ? size : 0, error);
}

// >>agent -------------------------------------------------------------------------------------------------------------
// Calls by name: the workers and their pipes, the calls begun here and their futures, the requests that came in.
//
// A caller has one pipe to each worker it calls, connected on the first call and again after a failure; the worker's
// own calls come back over a pipe of its own. Calls are numbered by their future's id, so a late reply finds nothing.
//
// Uses: atomic, os, base, wire, timer, loop, context, transport, channel, pipe, store.
// Invariant: a call is in its worker's `calls` from its start to its outcome, and its outcome is set once; a request
// is in its server's `requests` until it is answered; both are freed when `refs` is 0. Everything of a call or a
// request is under the lock of its loop; names and workers under the agent's own lock, which is taken inside a loop's;
// methods, and those resolved, change under the locks of all loops, taken in order: any one of them is enough to read.

enum { TPR_AGENT_NAME = 129, TPR_AGENT_TEXT = 256, TPR_AGENT_TAG = 0x746e6761 };   // "agnt"
enum { TPR_AGENT_SLICE_US = 200 };     // of a wait that more than one loop must be driven for
enum { TPR_AGENT_PATIENCE_US = 30000000 };   // of destroy, with receivers that keep what was given to them
enum { TPR_AGENT_CHUNK = 16, TPR_AGENT_CHUNKS = 24 };   // workers in the first chunk of the table; each next has twice
enum { TPR_AGENT_LOOP_SHIFT = 56, TPR_AGENT_INDEX_SHIFT = 32, TPR_AGENT_INDEX_MASK = 0xffffff };

typedef enum tpr_agent_state { TPR_AGENT_NEW, TPR_AGENT_STARTING, TPR_AGENT_READY, TPR_AGENT_FAILED, TPR_AGENT_LEAVING,
                               TPR_AGENT_LEFT } tpr_agent_state;

typedef struct tpr_agent_frame {       // a user's function of a method that may be running
    tpr_base_list node;                // of the loop's, while it runs
    uintptr_t thread;
    struct tpr_agent_method *method;   // NULL: of none
    bool      live;                    // the method was there when it began
} tpr_agent_frame;

typedef struct tpr_agent_method {
    tprpc_method_desc desc;
    char      name[TPR_AGENT_NAME];
    uint32_t  id, refs;                // refs: atomic
    bool      removed;
} tpr_agent_method;

typedef struct tpr_agent_worker {      // a peer as this agent calls it
    tpr_pipe_user user;                // first: of its pipe
    struct tprpc_agent *agent;
    tpr_loop     *loop;
    char          name[TPR_AGENT_NAME];
    uint32_t      index, rank;         // index: in method ids
    bool          known;               // its addresses are
    tpr_wire_worker *where;
    tprpc_pipe   *pipe;
    tpr_base_list calls;               // tpr_agent_call.node
    tprpc_store_op *op;
} tpr_agent_worker;

typedef struct tpr_agent_placing {     // memory of a user's that a message is received in
    tprpc_placement placement;
    uint32_t      block;
    tprpc_unplaced unplaced;
    void         *user;
    tpr_loop_task task;                // place, later perhaps on_unplaced
    tpr_loop     *loop;
    void         *owner;               // the call or the request
    tpr_pipe_in  *in;                  // the message, once it has failed: on_unplaced reads its descriptor
    tprpc_place   place;
    tpr_agent_frame frame;             // its method: of a request's
    struct tprpc_agent *agent;
    tprpc_status  status;
    tprpc_tensor  tensors[1];
} tpr_agent_placing;

typedef struct tpr_agent_map {         // an entry of the device map
    const char  *worker;               // of the agent's table of names; NULL: every one
    tprpc_device from, to;
} tpr_agent_map;

typedef struct tpr_agent_call {        // a call begun here, and its future
    tpr_base_slot slot;                // first
    tpr_base_list node;                // of the worker's calls
    struct tpr_agent_worker *worker;
    tprpc_work    timer;
    tpr_loop_task task;                // on_done
    uint32_t      refs, flags;
    bool          done, awaited, reading, parked, has_future;
    tprpc_status  status;
    int64_t       timeout_ms;
    tprpc_error  *error;               // NULL: none, or no memory for it
    tpr_pipe_in  *in;                  // the reply, being received or received
    tpr_agent_placing *placing;
    tprpc_done    on_done;
    tprpc_place   place;
    tprpc_unplaced on_unplaced;
    void         *user;
    const char   *method_name;         // of the agent's table of names
    tprpc_stream *streams;             // for the reply; NULL: the library's
    size_t        stream_count;
} tpr_agent_call;

typedef struct tpr_agent_server {      // a pipe that a caller's requests come in by
    tpr_pipe_user user;                // first
    struct tprpc_agent *agent;
    tpr_loop     *loop;
    tpr_base_list node;                // of the loop's servers
    tprpc_pipe   *pipe;                // NULL: ended
    const char   *caller;              // of the agent's table of names; NULL before it introduced itself
    uint32_t      refs;
    tpr_base_list requests, lanes;     // in the order of arrival; those with a lane whose handlers have not begun
    tpr_base_map  by_call;             // of the requests: see tpr_agent_request_called
} tpr_agent_server;

typedef struct tpr_agent_request {
    tpr_base_slot slot;                // first
    tpr_base_list node, lane_node;     // of the server's requests, of its lanes
    tpr_agent_server *server;
    tpr_agent_method *method;
    uint64_t      call;                // the caller's number
    uint32_t      refs, lane;
    bool          one_way, reading, parked, whole, running, kept, cancelled, answered;   // running: from its start
    bool          mapped;              // in its server's map by the caller's number
    tprpc_work    retry;               // of a submission that the engine refused
    tpr_pipe_in  *in;
    tpr_agent_placing *placing;
    tpr_loop_task task;                // the handler, or its submission
    tpr_agent_frame frame;
    struct tpr_agent_request *next_job;
} tpr_agent_request;

typedef struct tpr_agent_send {        // an outgoing message that lends memory, or did not leave at once
    tpr_pipe_write write;              // first
    tpr_loop_task  task;
    tpr_loop      *loop;
    void         (*release)(void *user);
    void          *release_user;
    struct tprpc_agent *agent;
    uint64_t       call;               // a one-way call, whose outcome this is; 0: none
    uint32_t       gift;               // 1: its memory is given
} tpr_agent_send;

typedef struct tpr_agent_loop {        // what an agent has on one loop
    tpr_base_slab calls, requests;
    tpr_base_list servers, running;    // running: tpr_agent_frame
    tpr_agent_request *held, **held_tail;   // started, in order, before the agent itself had: by next_job
    bool drained;                      // someone waits until no call is active
    uint64_t active, started, failed, timed_out, cancelled, late;   // calls
    uint64_t unanswered, received, received_failed, async_now, sends;   // requests; callbacks under way, of which
    uint64_t gifts;                    // wait for who was given the memory
    uint64_t bytes_sent, bytes_received, tensor_sent, tensor_received, tensor_adopted, fast;   // of pipes that are gone
} tpr_agent_loop;

#ifndef TPRPC_NO_THREADS
typedef struct tpr_agent_thread { tpr_os_thread thread; struct tprpc_agent *agent; char name[24]; } tpr_agent_thread;
#endif

typedef struct tpr_agent_start {       // a key of the group that is awaited
    struct tprpc_agent *agent;
    uint32_t rank;
    tprpc_store_op *op;
} tpr_agent_start;

struct tprpc_agent {
    tprpc_context  *ctx;
    bool            own_context, own_store, insecure, is_static, serve_store, starting_done;
    tpr_os_lock     lock;
    tpr_agent_state state;             // under the first loop's lock
    char            name[TPR_AGENT_NAME], init_method[TPR_AGENT_TEXT], address[TPR_AGENT_TEXT];
    uint32_t        rank, world_size;
    int64_t         timeout_ms, start_timeout_ms;
    uint64_t        nonce;
    tprpc_store    *store;
    tprpc_listener *listener;
    tpr_wire_worker self;
    tpr_agent_loop *loops;             // ctx->loop_count of them
    tpr_base_map    methods, names, by_name, resolved;   // by id; text by hash; workers by hash of their name; text by
                                                         // id
    tpr_agent_worker **workers[TPR_AGENT_CHUNKS];   // by index, in chunks that stay: read without a lock
    uint32_t        worker_count;      // atomic
    tpr_agent_map  *maps;              // map_count of them; as they are from the start on
    uint32_t        map_count, map_capacity;
    tpr_agent_start *starts;           // world_size of them, of start and of leave
    uint32_t        start_pending;
    bool            gathering;         // name and rank are claimed, the others are awaited
    tprpc_work      start_timer;
    tprpc_error     start_error;       // of the step under way, of start or of leave
    tprpc_error     ready_error;       // how the start ended; as it is from then on, so read without a lock
    tprpc_done      on_ready;
    void           *ready_user;
    tpr_loop_task   ready_task;
    uint32_t        jobs;              // atomic: submitted or queued for workers, and not ended
    uint32_t        closing;           // atomic: it is being destroyed
    int32_t         worker_threads;
    uint32_t        thread_count;
    tpr_agent_request *job_head, **job_tail;   // under the lock
    uint32_t        job_signal;        // atomic, what threads sleep on
    bool            stopping;
#ifndef TPRPC_NO_THREADS
    tpr_agent_thread *threads;
#endif
};

static tpr_loop *tpr_agent_home(tprpc_agent *agent) { return &agent->ctx->loops[0]; }

// Any thread; what it is told may have changed by then, but where it holds the first loop's lock.
static inline tpr_agent_state tpr_agent_state_of(tprpc_agent *agent) {
    return (tpr_agent_state)TPR_ATOMIC_LOAD((uint32_t *)(void *)&agent->state);
}

static void *tpr_agent_alloc(tprpc_agent *agent, size_t size) {
    return tpr_base_new(&agent->ctx->env.memory, size, (uint32_t)TPR_AGENT_TAG);
}

static void tpr_agent_free(tprpc_agent *agent, void *ptr, size_t size) {
    tpr_base_free(&agent->ctx->env.memory, ptr, size, (uint32_t)TPR_AGENT_TAG);
}

// ---- names: text that stays until the agent is destroyed

// Under the agent's lock. NULL: no memory.
static const char *tpr_agent_text(tprpc_agent *agent, const char *text) {
    size_t size = strlen(text) + 1;
    uint64_t hash = tpr_base_hash(text, size);
    const char *found;
    while ((found = (const char *)tpr_base_map_get(&agent->names, hash)) != NULL) {
        if (strcmp(found, text) == 0) return found;
        hash++;
    }
    char *copy = (char *)tpr_agent_alloc(agent, size);
    if (!copy) return NULL;
    memcpy(copy, text, size);
    if (tpr_base_map_put(&agent->names, hash, copy)) return copy;
    tpr_agent_free(agent, copy, size);
    return NULL;
}

TPR_COLD static const char *tpr_agent_text_locked(tprpc_agent *agent, const char *text) {
    tpr_os_lock_take(&agent->lock);
    const char *kept = tpr_agent_text(agent, text);
    tpr_os_lock_give(&agent->lock);
    return kept;
}

// ---- methods

// The number that stands for a method on the wire; never 0.
static uint32_t tpr_agent_method_id(const char *name) {
    uint64_t hash = tpr_base_hash(name, strlen(name));
    uint32_t id = (uint32_t)(hash ^ hash >> 32);
    return id ? id : 1;
}

static void tpr_agent_method_unref(tprpc_agent *agent, tpr_agent_method *method) {
    if (TPR_ATOMIC_SUB(&method->refs, 1u) == 1) tpr_agent_free(agent, method, sizeof *method);
}

// Under a loop's lock.
static tpr_agent_method *tpr_agent_method_take(tprpc_agent *agent, uint32_t id) {
    tpr_agent_method *method = (tpr_agent_method *)tpr_base_map_get(&agent->methods, id);
    if (method) TPR_ATOMIC_ADD(&method->refs, 1u);
    return method;
}

static void tpr_agent_enter_all(tprpc_agent *agent) {
    for (uint32_t i = 0; i < agent->ctx->loop_count; i++) tpr_loop_enter(&agent->ctx->loops[i]);
}

// The last one alone may write the user's log, which no lock is held for.
static void tpr_agent_leave_all(tprpc_agent *agent) {
    for (uint32_t i = agent->ctx->loop_count; i-- > 1;) tpr_os_lock_give(&agent->ctx->loops[i].lock);
    tpr_loop_leave(&agent->ctx->loops[0]);
}

// Puts the calling thread down as running a user's function, unless its method was removed. Under the loop's lock.
static void tpr_agent_frame_begin(tpr_agent_loop *on, tpr_agent_frame *frame) {
    frame->live = !frame->method || !frame->method->removed;
    frame->thread = tpr_os_thread_id();
    if (frame->live && frame->method) tpr_base_list_add(&on->running, &frame->node);
}

// ---- ids

static uint64_t tpr_agent_id(const tpr_base_slot *slot, const tpr_loop *loop) {
    return (uint64_t)loop->index << TPR_AGENT_LOOP_SHIFT | (uint64_t)slot->index << TPR_AGENT_INDEX_SHIFT |
           slot->generation;
}

// The loop of a future or request, NULL for one that is none.
static inline tpr_loop *tpr_agent_loop_of(void *owner, uint64_t id) {
    tprpc_agent *agent = (tprpc_agent *)owner;
    if (!agent || !id || !tpr_context_usable(agent->ctx)) return NULL;
    uint32_t index = (uint32_t)(id >> TPR_AGENT_LOOP_SHIFT);
    return index < agent->ctx->loop_count ? &agent->ctx->loops[index] : NULL;
}

static inline tpr_base_slot *tpr_agent_find(const tpr_base_slab *slab, uint64_t id) {
    return tpr_base_slab_find(slab, (uint32_t)(id >> TPR_AGENT_INDEX_SHIFT) & TPR_AGENT_INDEX_MASK, (uint32_t)id);
}

static inline tpr_agent_loop *tpr_agent_on(tprpc_agent *agent, const tpr_loop *loop) {
    return &agent->loops[loop->index];
}

// ---- sending

static void tpr_agent_call_end(tpr_agent_call *call, tprpc_status status, const tprpc_error *error);
static void tpr_agent_call_fail(tpr_agent_call *call, const tprpc_error *cause);

static void tpr_agent_send_run(tpr_loop_task *task) {
    tpr_agent_send *send = TPR_CONTAINER(task, tpr_agent_send, task);
    if (send->release) send->release(send->release_user);
}

static void tpr_agent_send_done(tpr_loop_task *task) {
    tpr_agent_send *send = TPR_CONTAINER(task, tpr_agent_send, task);
    tpr_agent_on(send->agent, send->loop)->sends--;
    tpr_base_pool_free(&send->loop->pool, send, sizeof *send);
}

static void tpr_agent_send_ended(tpr_pipe_write *write) {
    tpr_agent_send *send = (tpr_agent_send *)(void *)write;
    tpr_agent_on(send->agent, send->loop)->gifts -= send->gift;
    if (send->call) {
        tpr_agent_call *call =
            (tpr_agent_call *)(void *)tpr_agent_find(&tpr_agent_on(send->agent, send->loop)->calls, send->call);
        // A peer that would not take the tensors while the pipe is well says why in its answer.
        bool refused = call && write->status == TPRPC_ERROR_PEER && call->worker->pipe &&
                       call->worker->pipe->state == TPR_PIPE_OPEN;
        if (call && !call->done && write->status != TPRPC_OK && !refused) tpr_agent_call_fail(call, &write->error);
        else if (call && !call->done && (call->flags & TPRPC_CALL_ONE_WAY)) tpr_agent_call_end(call, TPRPC_OK, NULL);
    }
    if (send->release) tpr_loop_post(send->loop, &send->task);
    else tpr_agent_send_done(&send->task);
}

// A send that the agent waits for before it goes. NULL: no memory.
static tpr_agent_send *tpr_agent_send_new(tprpc_agent *agent, tpr_loop *loop, const tprpc_message *message,
                                          uint64_t call) {
    tpr_agent_send *send = (tpr_agent_send *)tpr_base_pool_alloc(&loop->pool, sizeof *send);
    if (!send) return NULL;
    send->task.begin = NULL;
    send->task.run = tpr_agent_send_run;
    send->task.done = tpr_agent_send_done;
    send->task.busy = NULL;
    send->loop = loop;
    send->release = message->release;
    send->release_user = message->release_user;
    send->agent = agent;
    send->call = call;
    tpr_agent_on(agent, loop)->sends++;
    return send;
}

// Sends a message with a call's prefix over a pipe, under its loop's lock. call: whose failure to leave is its
// outcome, 0: none. On an error the message's release has not run: it is the caller's to run, without the lock.
static tprpc_status tpr_agent_send_on(tprpc_agent *agent, tprpc_pipe *pipe, const tpr_wire_call *prefix,
                                      const tprpc_message *message, uint64_t call, tprpc_error *error) {
    uint8_t bytes[TPR_WIRE_CALL_BYTES];
    bool bare = !message->release && pipe->state == TPR_PIPE_OPEN && tpr_pipe_is_inline(pipe, message) &&
                !(prefix->flags & TPR_WIRE_CALL_ONE_WAY && call);
    tprpc_status status;
    tpr_wire_put_call(bytes, prefix);
    if (bare) {
        if (message->metadata_size <= 64 && !message->tensor_count) tpr_agent_on(agent, pipe->loop)->fast++;
        return tpr_pipe_send(pipe, NULL, bytes, sizeof bytes, message, true, error);
    }
    tpr_agent_send *send = tpr_agent_send_new(agent, pipe->loop, message, call);
    if (!send) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory to send a message");
    send->gift = message->release && (message->flags & TPRPC_MESSAGE_GIVE) ? 1 : 0;
    tpr_agent_on(agent, pipe->loop)->gifts += send->gift;
    tpr_pipe_write_begin(pipe, &send->write, tpr_agent_send_ended);
    status = tpr_pipe_send(pipe, &send->write, bytes, sizeof bytes, message, message->release != NULL, error);
    if (status == TPRPC_OK) return TPRPC_OK;
    tpr_agent_on(agent, send->loop)->gifts -= send->gift;
    tpr_pipe_write_undo(&send->write);
    tpr_agent_send_done(&send->task);  // the pipe may be gone by now
    return status;
}

// Sends one of the agent's own messages: an error, a cancel, an introduction. The peer waits for it, so it goes also
// where the pipe holds what it may: a few bytes, once for each call. If that fails, so does the pipe, whose user may be
// gone then.
static void tpr_agent_say(tprpc_agent *agent, tprpc_pipe *pipe, uint8_t kind, uint64_t id, const void *body,
                          size_t size) {
    tpr_wire_call prefix;
    tprpc_message message;
    tprpc_error error;
    memset(&prefix, 0, sizeof prefix);
    memset(&message, 0, sizeof message);
    prefix.kind = kind;
    prefix.id = id;
    message.metadata = body;
    message.metadata_size = size;
    pipe->refs++;
    tprpc_status status = tpr_agent_send_on(agent, pipe, &prefix, &message, 0, &error);
    if (status == TPRPC_ERROR_LIMIT && pipe->state == TPR_PIPE_OPEN) {
        uint8_t bytes[TPR_WIRE_CALL_BYTES];
        tpr_wire_put_call(bytes, &prefix);
        status = tpr_pipe_send_planned(pipe, NULL, bytes, sizeof bytes, &message, &error);
    }
    if (status != TPRPC_OK && kind != TPR_WIRE_CANCEL)
        tpr_pipe_end(pipe, status, 0, "a word to the peer could not be sent: %.160s", error.text);
    tpr_pipe_unref(pipe);
}

TPR_COLD
static void tpr_agent_say_error(tprpc_agent *agent, tprpc_pipe *pipe, uint64_t id, tprpc_status status,
                                int32_t user_code, const char *text) {
    uint8_t body[300];
    char cut[200];
    snprintf(cut, sizeof cut, "%s", text);
    tpr_agent_say(agent, pipe, TPR_WIRE_ERROR, id, body, tpr_wire_put_error(body, sizeof body, status, user_code, cut));
}

// ---- placing: memory of a user's for a message's tensors

static void tpr_agent_placing_free(tpr_agent_placing *placing) {
    tpr_base_list_remove(&placing->frame.node);
    if (placing->frame.method) tpr_agent_method_unref(placing->agent, placing->frame.method);
    tpr_base_pool_free(&placing->loop->pool, placing, placing->block);
}

static void tpr_agent_placing_begin(tpr_loop_task *task) {
    tpr_agent_placing *placing = TPR_CONTAINER(task, tpr_agent_placing, task);
    tpr_agent_frame_begin(tpr_agent_on(placing->agent, placing->loop), &placing->frame);
}

static void tpr_agent_placing_done(tpr_loop_task *task) {
    tpr_agent_placing *placing = TPR_CONTAINER(task, tpr_agent_placing, task);
    tpr_agent_on(placing->agent, placing->loop)->sends--;
    tpr_pipe_in_free(placing->in);
    tpr_agent_placing_free(placing);
}

static void tpr_agent_unplace_run(tpr_loop_task *task) {
    tpr_agent_placing *placing = TPR_CONTAINER(task, tpr_agent_placing, task);
    if (placing->frame.live) placing->unplaced(&placing->placement, placing->user);
}

// The message failed: the user gets his memory back, on the callback thread. The message is freed here or after that.
TPR_COLD static void tpr_agent_unplace(tpr_agent_placing *placing, tpr_pipe_in *in) {
    if (!placing->unplaced || placing->status != TPRPC_OK) {
        tpr_pipe_in_free(in);
        tpr_agent_placing_free(placing);
        return;
    }
    placing->in = in;
    tpr_agent_on(placing->agent, placing->loop)->sends++;
    placing->task.run = tpr_agent_unplace_run;
    placing->task.done = tpr_agent_placing_done;
    tpr_loop_post(placing->loop, &placing->task);
}

static void tpr_agent_place_run(tpr_loop_task *task) {
    tpr_agent_placing *placing = TPR_CONTAINER(task, tpr_agent_placing, task);
    placing->status =
        placing->frame.live ? placing->place(&placing->placement, placing->user) : TPRPC_ERROR_NO_METHOD;
    if (placing->status == TPRPC_PENDING) placing->status = TPRPC_ERROR_INVALID;   // that is no outcome
}

// Asks the user where a message's tensors go: place runs without the lock, then `placed` under it.
static tpr_agent_placing *tpr_agent_place(tprpc_agent *agent, tpr_pipe_in *in, tprpc_place place,
                                          tprpc_unplaced unplaced, void *user, void *owner,
                                          void (*placed)(tpr_loop_task *)) {
    size_t size = sizeof(tpr_agent_placing) + in->message.tensor_count * sizeof(tprpc_tensor);
    tpr_agent_placing *placing = (tpr_agent_placing *)tpr_base_pool_alloc(&in->loop->pool, size);
    if (!placing) return NULL;
    memset(placing, 0, sizeof *placing);
    tpr_base_list_init(&placing->frame.node);
    placing->block = (uint32_t)size;
    placing->agent = agent;
    placing->loop = in->loop;
    placing->place = place;
    placing->unplaced = unplaced;
    placing->user = user;
    placing->owner = owner;
    placing->task.begin = tpr_agent_placing_begin;
    placing->task.run = tpr_agent_place_run;
    placing->task.done = placed;
    placing->placement.size = (uint32_t)sizeof placing->placement;
    placing->placement.descriptor = &in->message;
    placing->placement.tensors = placing->tensors;
    for (size_t i = 0; i < in->message.tensor_count; i++) {
        placing->tensors[i] = in->tensors[i];
        placing->tensors[i].device = in->tensors[i].target.kind == TPRPC_DEVICE_DEFAULT
                                         ? tpr_pipe_device(in->tensors[i].device)
                                         : in->tensors[i].target;
    }
    in->pipe->refs++;                  // it may end and be closed before; `placed` reads from it, and gives this back
    tpr_loop_post_place(in->loop, &placing->task);
    return placing;
}

// The allocation that a placement amounts to.
static tprpc_message tpr_agent_placed(const tpr_agent_placing *placing, const tpr_pipe_in *in) {
    tprpc_message allocation;
    memset(&allocation, 0, sizeof allocation);
    allocation.tensors = placing->tensors;
    allocation.tensor_count = in->message.tensor_count;
    allocation.payloads = in->payloads;
    allocation.payload_count = in->message.payload_count;
    return allocation;
}

// ---- devices: where a call's tensors go, and the streams they are ordered on

// Whether a device is one of this context's; `what` and i name it in the error.
static tprpc_status tpr_agent_check_device(tprpc_context *ctx, tprpc_device device, const char *what, size_t i,
                                           tprpc_error *error) {
    const tpr_context_backend *entry = tpr_pipe_converter(ctx, device.kind);
    int32_t count = 1;
    if (entry) count = entry->backend->converter->device_count ? entry->backend->converter->device_count(
                           entry->backend->user) : INT32_MAX;
    else if (device.kind != TPRPC_CPU)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                               "%s[%zu] is of device kind %d, for which this context has no converter", what, i,
                               (int)device.kind);
    if (device.index >= 0 && device.index < count) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "%s[%zu] is device %d of kind %d, of which there are %d here",
                           what, i, (int)device.index, (int)device.kind, (int)count);
}

// Where a worker's tensors from a device go; DEFAULT: nobody said.
static tprpc_device tpr_agent_mapped(const tpr_agent_worker *worker, tprpc_device from) {
    const tprpc_agent *agent = worker->agent;
    tprpc_device to = TPR_ZERO;
    for (uint32_t i = 0; i < agent->map_count; i++) {
        const tpr_agent_map *map = &agent->maps[i];
        if (!tpr_pipe_same_device(map->from, from)) continue;
        if (map->worker && strcmp(map->worker, worker->name) == 0) return map->to;
        if (!map->worker) to = map->to;
    }
    return to;
}

static void *tpr_agent_stream_of(const tprpc_stream *streams, size_t count, tprpc_device device) {
    for (size_t i = 0; i < count; i++)
        if (tpr_pipe_same_device(streams[i].device, device)) return streams[i].stream;
    return NULL;
}

static tprpc_status tpr_agent_check_streams(tprpc_context *ctx, const tprpc_call_options *options, tprpc_error *error) {
    if (!options->streams)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "streams is NULL, stream_count is not 0");
    for (size_t i = 0; i < options->stream_count; i++) {
        tprpc_device device = options->streams[i].device;
        if (!tpr_pipe_converter(ctx, device.kind))   // host memory too: it has no streams
            return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                                   "streams[%zu] is of device kind %d, for which this context has no converter", i,
                                   (int)device.kind);
        tprpc_status status = tpr_agent_check_device(ctx, device, "streams", i, error);
        if (status != TPRPC_OK) return status;
        for (size_t k = 0; k < i; k++)
            if (tpr_pipe_same_device(options->streams[k].device, device))
                return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "streams[%zu] and [%zu] are of one device", k, i);
    }
    return TPRPC_OK;
}

// Sends a call whose tensors may have to be told where they go and in what order.
static tprpc_status tpr_agent_send_call(tpr_agent_worker *worker, const tpr_wire_call *prefix,
                                        const tprpc_message *message, const tprpc_call_options *options, uint64_t id,
                                        tprpc_error *error) {
    tprpc_agent *agent = worker->agent;
    size_t count = message->tensor_count;
    if (TPR_LIKELY(!count || (!agent->map_count && !options->stream_count)))
        return tpr_agent_send_on(agent, worker->pipe, prefix, message, id, error);
    tprpc_message told = *message;
    tprpc_tensor *tensors = (tprpc_tensor *)tpr_base_pool_alloc(&worker->loop->pool, count * sizeof *tensors);
    if (!tensors) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for the call's tensors");
    for (size_t i = 0; i < count; i++) {
        tprpc_tensor *tensor = &tensors[i];
        *tensor = message->tensors[i];
        tprpc_device from = tpr_pipe_device(tensor->device);
        if (tensor->target.kind == TPRPC_DEVICE_DEFAULT) tensor->target = tpr_agent_mapped(worker, from);
        if (!tensor->stream) tensor->stream = tpr_agent_stream_of(options->streams, options->stream_count, from);
    }
    told.tensors = tensors;
    tprpc_status status = tpr_agent_send_on(agent, worker->pipe, prefix, &told, id, error);
    tpr_base_pool_free(&worker->loop->pool, tensors, count * sizeof *tensors);
    return status;
}

// ---- calls begun here

TPR_APART static void tpr_agent_call_free(tprpc_agent *agent, tpr_agent_call *call) {
    tpr_loop *loop = call->worker->loop;
    if (call->in) tpr_pipe_in_free(call->in);
    if (call->error) tpr_base_pool_free(&loop->pool, call->error, sizeof *call->error);
    if (call->streams) tpr_base_pool_free(&loop->pool, call->streams, call->stream_count * sizeof *call->streams);
    call->in = NULL;
    call->error = NULL;
    tpr_base_slab_give(&tpr_agent_on(agent, loop)->calls, &call->slot);
}

static inline void tpr_agent_call_unref(tprpc_agent *agent, tpr_agent_call *call) {
    if (--call->refs == 0) tpr_agent_call_free(agent, call);
}

static void tpr_agent_done_run(tpr_loop_task *task) {
    tpr_agent_call *call = TPR_CONTAINER(task, tpr_agent_call, task);
    const tprpc_message *reply = call->status == TPRPC_OK && call->in ? &call->in->message : NULL;
    tprpc_error plain;
    const tprpc_error *error = call->status == TPRPC_OK ? NULL : call->error;
    if (call->status != TPRPC_OK && !error) {
        tprpc_error_set(&plain, call->status, 0, "the call failed, and no memory was left to say why");
        error = &plain;
    }
    call->on_done(call->status, reply, error, call->user);
}

static void tpr_agent_done_over(tpr_loop_task *task) {
    tpr_agent_call *call = TPR_CONTAINER(task, tpr_agent_call, task);
    tprpc_agent *agent = call->worker->agent;
    tpr_agent_on(agent, call->worker->loop)->sends--;
    tpr_agent_call_unref(agent, call);
}

// Asks the transfers of a message that is being received to end.
TPR_COLD static void tpr_agent_abort_in(tpr_pipe_in *in) {
    in->pending++;
    for (uint32_t k = 0; k < in->transfer_count; k++)
        if (in->transfers[k].base.done) tpr_pipe_abort(&in->transfers[k], false);
    tpr_pipe_in_done(in, TPRPC_OK, NULL);
}

// What a profiler sees of a call; a span's id is its own among all agents of the process, as long as it lasts.
static void tpr_agent_call_active(tpr_agent_call *call, tpr_agent_loop *on, bool begins) {
    on->active = begins ? on->active + 1 : on->active - 1;
    if (begins) {
        TPRPC_SPAN_BEGIN("tprpc call", (uint64_t)(uintptr_t)call);
    } else {
        TPRPC_SPAN_END("tprpc call", (uint64_t)(uintptr_t)call);
    }
    TPRPC_PLOT("tprpc active calls", (int64_t)on->active);
}

// Sets a call's outcome, once.
static void tpr_agent_call_end(tpr_agent_call *call, tprpc_status status, const tprpc_error *error) {
    tprpc_agent *agent = call->worker->agent;
    tpr_loop *loop = call->worker->loop;
    tpr_agent_loop *on = tpr_agent_on(agent, loop);
    if (call->done) return;
    call->done = true;
    call->status = status;
    if (error && (call->error = (tprpc_error *)tpr_base_pool_alloc(&loop->pool, sizeof *error)) != NULL) {
        *call->error = *error;
        call->error->status = status;
    }
    tpr_agent_call_active(call, on, false);
    if (on->active == 0 && on->drained) tpr_loop_notify(loop);
    if (status != TPRPC_OK) on->failed++;
    if (status == TPRPC_ERROR_TIMEOUT) on->timed_out++;
    if (status == TPRPC_ERROR_CANCELLED) on->cancelled++;
    tpr_timer_cancel(&loop->wheel, &call->timer);
    tpr_base_list_remove(&call->node);
    if (call->on_done) {
        call->refs++;
        on->sends++;
        tpr_loop_post(loop, &call->task);
    }
    if (call->awaited) tpr_loop_notify(loop);
    if (call->reading && !call->parked && status != TPRPC_OK) tpr_agent_abort_in(call->in);
    tpr_agent_call_unref(agent, call);
}

static void tpr_agent_call_fail(tpr_agent_call *call, const tprpc_error *cause) {
    tprpc_error error = *cause;
    tprpc_error_set(&error, cause->status, cause->os_code, "calling %s on %s: %.180s", call->method_name,
                    call->worker->name, cause->text);
    error.user_code = cause->user_code;
    tpr_agent_call_end(call, error.status, &error);
}

static void tpr_agent_cancel_at_peer(tpr_agent_call *call) {
    tpr_agent_worker *worker = call->worker;
    // Where the pipe still connects it goes behind the call.
    if (worker->pipe && worker->pipe->state != TPR_PIPE_ENDED && !(call->flags & TPRPC_CALL_ONE_WAY))
        tpr_agent_say(worker->agent, worker->pipe, TPR_WIRE_CANCEL, tpr_agent_id(&call->slot, worker->loop), NULL, 0);
}

static void tpr_agent_call_timed_out(tprpc_work *work) {
    tpr_agent_call *call = TPR_CONTAINER(work, tpr_agent_call, timer);
    tprpc_error error = TPR_ZERO;
    tprpc_error_set(&error, TPRPC_ERROR_TIMEOUT, 0, "calling %s on %s: no answer within %lld ms", call->method_name,
                    call->worker->name, (long long)call->timeout_ms);
    tpr_agent_cancel_at_peer(call);
    tpr_agent_call_end(call, TPRPC_ERROR_TIMEOUT, &error);
}

// ---- replies

static void tpr_agent_in_dropped(tpr_pipe_in *in) { tpr_pipe_in_free(in); }

// Lets a message go that nobody wants, and tells the sender's channels.
static void tpr_agent_drop_in(tpr_pipe_in *in) {
    if (in->transfer_count) tpr_pipe_in_read(in, NULL, true, tpr_agent_in_dropped);
    else tpr_pipe_in_free(in);
}

// A reply's bytes are there, or will not come.
static void tpr_agent_reply_read(tpr_pipe_in *in) {
    tpr_agent_call *call = (tpr_agent_call *)in->user;
    tprpc_agent *agent = call->worker->agent;
    tpr_agent_placing *placing = call->placing;
    bool good = in->status == TPRPC_OK && !call->done;
    call->reading = false;
    call->placing = NULL;
    if (placing && good) tpr_agent_placing_free(placing);
    if (good) tpr_agent_call_end(call, TPRPC_OK, NULL);
    else if (!call->done) tpr_agent_call_fail(call, &in->error);
    if (!good) {
        call->in = NULL;
        if (placing) tpr_agent_unplace(placing, in);
        else tpr_pipe_in_free(in);
    }
    tpr_agent_call_unref(agent, call);
}

static void tpr_agent_reply_placed(tpr_loop_task *task) {
    tpr_agent_placing *placing = TPR_CONTAINER(task, tpr_agent_placing, task);
    tpr_base_list_remove(&placing->frame.node);
    tpr_agent_call *call = (tpr_agent_call *)placing->owner;
    bool refuse = placing->status != TPRPC_OK || call->done;
    tprpc_message allocation = tpr_agent_placed(placing, call->in);
    if (placing->status != TPRPC_OK && !call->done) {
        tprpc_error error = TPR_ZERO;
        tprpc_error_set(&error, placing->status, 0, "place refused the reply");
        tpr_agent_call_fail(call, &error);   // parked still: there is no read yet that it could abort
    }
    tprpc_pipe *pipe = call->in->pipe;
    call->parked = false;
    tpr_pipe_in_read(call->in, &allocation, refuse, tpr_agent_reply_read);
    tpr_pipe_unref(pipe);
}

static void tpr_agent_on_reply(tpr_agent_worker *worker, tpr_agent_call *call, tpr_pipe_in *in) {
    call->in = in;
    in->user = call;
    call->reading = true;
    call->refs++;
    for (size_t i = 0; call->streams && i < in->message.tensor_count; i++) {
        tprpc_tensor *tensor = &in->tensors[i];
        tprpc_device device =
            tensor->target.kind == TPRPC_DEVICE_DEFAULT ? tpr_pipe_device(tensor->device) : tensor->target;
        tensor->stream = tpr_agent_stream_of(call->streams, call->stream_count, device);
    }
    if (call->place && in->message.tensor_count) {
        call->parked = true;           // nothing moves until it is placed
        call->placing = tpr_agent_place(worker->agent, in, call->place, call->on_unplaced, call->user, call,
                                        tpr_agent_reply_placed);
        if (call->placing) {
            call->placing->placement.worker = worker->name;
            call->placing->placement.method = call->method_name;
            return;
        }
        tprpc_error error = TPR_ZERO;
        tprpc_error_set(&error, TPRPC_ERROR_MEMORY, 0, "no memory to place the reply");
        tpr_agent_call_fail(call, &error);   // parked still: there is no read yet that it could abort
        call->parked = false;
    }
    tpr_pipe_in_read(in, NULL, call->done, tpr_agent_reply_read);
}

static void tpr_agent_worker_message(tpr_pipe_user *user, tpr_pipe_in *in) {
    tpr_agent_worker *worker = (tpr_agent_worker *)(void *)user;
    tpr_agent_loop *on = tpr_agent_on(worker->agent, worker->loop);
    tpr_wire_call prefix;
    tprpc_error error;
    if (!tpr_wire_get_call(in->prefix, in->prefix_size, &prefix) || in->message.payload_count ||
        (prefix.kind != TPR_WIRE_REPLY && prefix.kind != TPR_WIRE_ERROR)) {
        tpr_pipe_end(worker->pipe, TPRPC_ERROR_PROTOCOL, 0, "%s sent something else than a reply", worker->name);
        tpr_agent_drop_in(in);         // after that, for it may end the pipe
        return;
    }
    tpr_agent_call *call = (tpr_agent_call *)(void *)tpr_agent_find(&on->calls, prefix.id);
    if (!call || call->worker != worker || call->done || call->reading) {
        on->late++;
        tpr_agent_drop_in(in);
        return;
    }
    if (prefix.kind == TPR_WIRE_REPLY) {
        tpr_agent_on_reply(worker, call, in);
        return;
    }
    if (!tpr_wire_get_error(in->message.metadata, in->message.metadata_size, &error))
        tprpc_error_set(&error, TPRPC_ERROR_PROTOCOL, 0, "its error could not be read");
    tpr_agent_drop_in(in);
    // the handler's own words
    if (error.status == TPRPC_ERROR_REMOTE) tpr_agent_call_end(call, TPRPC_ERROR_REMOTE, &error);
    else if (error.status == TPRPC_ERROR_NO_METHOD) {
        tprpc_error_set(&error, TPRPC_ERROR_NO_METHOD, 0, "worker %s has no method %s", worker->name,
                        call->method_name);
        tpr_agent_call_end(call, TPRPC_ERROR_NO_METHOD, &error);
    } else tpr_agent_call_fail(call, &error);
}

// ---- workers and their pipes

static void tpr_agent_count_pipe(tpr_agent_loop *on, const tprpc_pipe *pipe) {
    on->bytes_sent += pipe->bytes_sent;
    on->bytes_received += pipe->bytes_received;
    on->tensor_sent += pipe->tensor_bytes_sent;
    on->tensor_received += pipe->tensor_bytes_received;
    on->tensor_adopted += pipe->tensor_bytes_adopted;
}

TPR_COLD static void tpr_agent_worker_ended(tpr_pipe_user *user) {
    tpr_agent_worker *worker = (tpr_agent_worker *)(void *)user;
    tprpc_pipe *pipe = worker->pipe;
    tpr_base_list calls;
    if (!pipe) return;
    worker->pipe = NULL;               // the next call connects again
    tpr_base_list_init(&calls);
    while (!tpr_base_list_empty(&worker->calls)) {   // a callback that calls again must not see itself in the list
        tpr_base_list *node = worker->calls.next;
        tpr_base_list_remove(node);
        tpr_base_list_add(&calls, node);
    }
    while (!tpr_base_list_empty(&calls)) {
        tpr_agent_call *call = TPR_CONTAINER(calls.next, tpr_agent_call, node);
        if (pipe->status == TPRPC_ERROR_NO_WORKER) tpr_agent_call_end(call, pipe->status, &pipe->error);
        else tpr_agent_call_fail(call, &pipe->error);
    }
    tpr_agent_count_pipe(tpr_agent_on(worker->agent, worker->loop), pipe);
    pipe->closed = true;
    pipe->user = NULL;
}

static void tpr_agent_worker_reach(tpr_agent_worker *worker) {
    tprpc_agent *agent = worker->agent;
    tprpc_pipe_desc desc = TPR_ZERO;
    tprpc_error error = TPR_ZERO;
    int32_t least = INT32_MAX;
    for (uint32_t a = 0; a < worker->where->address_count; a++) {   // the widest reach first; the pipe moves by itself
        char name[16];
        if (!tpr_transport_split(worker->where->addresses[a], name)) continue;
        const tpr_context_backend *entry = tpr_pipe_transport(agent->ctx, name, NULL);
        if (!entry || entry->priority >= least) continue;
        least = entry->priority;
        desc.address = worker->where->addresses[a];
    }
    desc.insecure = agent->insecure;
    if (!desc.address)
        tpr_pipe_end(worker->pipe, TPRPC_ERROR_UNREACHABLE, 0, "no transport of this context reaches it");
    else if (tpr_pipe_reach(worker->pipe, &desc, &error) != TPRPC_OK)
        tpr_pipe_end(worker->pipe, error.status, error.os_code, "%s", error.text);
    // A dead worker's child may hold its listening socket, where nobody says hello.
    if (worker->pipe) tpr_pipe_watch_process(worker->pipe, worker->where->space, worker->where->process);
}

// The store's word on where a worker is.
TPR_COLD static void tpr_agent_worker_found(tprpc_store_op *op, void *arg) {
    tpr_agent_worker *worker = (tpr_agent_worker *)arg;
    worker->op = NULL;
    tpr_agent_on(worker->agent, worker->loop)->sends--;
    if (!worker->pipe) return;
    if (op->status == TPRPC_OK && worker->where && tpr_wire_get_worker(op->value, op->value_size, worker->where)) {
        worker->rank = worker->where->rank;
        tpr_agent_worker_reach(worker);
    } else if (op->status == TPRPC_OK || (op->status == TPRPC_ERROR_TIMEOUT && op->cause == TPRPC_OK)) {   // not mute
        tpr_pipe_end(worker->pipe, TPRPC_ERROR_NO_WORKER, 0, "there is no worker %s in the group", worker->name);
    } else {
        tpr_pipe_end(worker->pipe, op->status, 0, "looking %s up: %.180s", worker->name, op->error.text);
    }
}

// Makes sure that the worker has a pipe, which may still be on its way. Under its loop's lock.
static tprpc_status tpr_agent_worker_connect(tpr_agent_worker *worker, tprpc_error *error) {
    tprpc_agent *agent = worker->agent;
    uint8_t intro[160];
    char key[TPR_AGENT_NAME + 16];
    if (worker->pipe) return TPRPC_OK;
    if (!worker->where) worker->where = (tpr_wire_worker *)tpr_agent_alloc(agent, sizeof *worker->where);
    if (!worker->where)
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory to connect to %s", worker->name);
    worker->pipe = tpr_pipe_new(agent->ctx, worker->loop, true, false, error);
    if (!worker->pipe) return error ? error->status : TPRPC_ERROR_MEMORY;
    worker->pipe->user = &worker->user;
    tpr_agent_say(agent, worker->pipe, TPR_WIRE_INTRO, 0, intro,
                  tpr_wire_put_intro(intro, sizeof intro, agent->name, agent->rank));
    if (!worker->pipe)
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory to connect to %s", worker->name);
    if (agent->is_static || worker->known) {
        tprpc_pipe *pipe = worker->pipe;
        tprpc_status reached = TPRPC_OK;
        pipe->refs++;                  // it may end at once
        tpr_agent_worker_reach(worker);
        if (!worker->pipe)
            reached = tprpc_error_set(error, pipe->status, pipe->error.os_code, "worker %s cannot be reached: %.160s",
                                      worker->name, pipe->error.text);
        tpr_pipe_unref(pipe);
        return reached;
    }
    tprpc_store_request request;
    memset(&request, 0, sizeof request);
    snprintf(key, sizeof key, "tprpc/name/%s", worker->name);
    request.size = (uint32_t)sizeof request;
    request.kind = TPRPC_STORE_GET;
    request.key = key;
    request.deadline_us = TPRPC_NOW;
    tprpc_status status = tpr_store_submit(agent->store, agent->ctx, worker->loop->index, &request,
                                           tpr_agent_worker_found, worker, &worker->op, error);
    if (status == TPRPC_OK) tpr_agent_on(agent, worker->loop)->sends++;   // until the store's word has come
    else tpr_pipe_end(worker->pipe, status, 0, "the store refused to look %s up", worker->name);
    return status;
}

// Where the table of workers has the one of that index; *chunk: the chunk it lies in.
static inline uint32_t tpr_agent_worker_place(uint32_t index, uint32_t *chunk) {
    uint32_t at = index + TPR_AGENT_CHUNK;
    *chunk = 31 - (uint32_t)__builtin_clz(at) - 4;
    return at - ((uint32_t)TPR_AGENT_CHUNK << *chunk);
}

// Any thread, without a lock; index is below worker_count.
static inline tpr_agent_worker *tpr_agent_worker_at(tprpc_agent *agent, uint32_t index) {
    uint32_t chunk, place = tpr_agent_worker_place(index, &chunk);
    return agent->workers[chunk][place];
}

static inline uint32_t tpr_agent_workers(tprpc_agent *agent) { return TPR_ATOMIC_LOAD(&agent->worker_count); }

// A new worker of that name at the end of the table, under the agent's lock. NULL: no memory.
static tpr_agent_worker *tpr_agent_worker_new(tprpc_agent *agent, const char *name, uint64_t hash) {
    uint32_t chunk, place = tpr_agent_worker_place(agent->worker_count, &chunk);
    if (chunk >= TPR_AGENT_CHUNKS) return NULL;
    if (!agent->workers[chunk])
        agent->workers[chunk] = (tpr_agent_worker **)tpr_agent_alloc(agent, ((size_t)TPR_AGENT_CHUNK << chunk) *
                                                                            sizeof *agent->workers[chunk]);
    if (!agent->workers[chunk]) return NULL;
    tpr_agent_worker *worker = (tpr_agent_worker *)tpr_agent_alloc(agent, sizeof *worker);
    if (!worker || !tpr_base_map_put(&agent->by_name, hash, worker)) {
        tpr_agent_free(agent, worker, sizeof *worker);
        return NULL;
    }
    worker->user.message = tpr_agent_worker_message;
    worker->user.ended = tpr_agent_worker_ended;
    worker->agent = agent;
    worker->loop = tpr_context_next_loop(agent->ctx);
    snprintf(worker->name, sizeof worker->name, "%s", name);
    tpr_base_list_init(&worker->calls);
    worker->index = agent->worker_count;
    agent->workers[chunk][place] = worker;
    TPR_ATOMIC_STORE(&agent->worker_count, agent->worker_count + 1);
    return worker;
}

// The worker of that name, made known when the group is dynamic. NULL: there is none, or no memory.
static tpr_agent_worker *tpr_agent_worker_of(tprpc_agent *agent, const char *name, bool create) {
    uint64_t hash = tpr_base_hash(name, strlen(name));
    tpr_agent_worker *worker;
    tpr_os_lock_take(&agent->lock);
    while ((worker = (tpr_agent_worker *)tpr_base_map_get(&agent->by_name, hash)) != NULL &&
           strcmp(worker->name, name) != 0)
        hash++;
    if (!worker && create && tpr_base_name_fault(name, strlen(name), TPR_AGENT_NAME - 1) == NULL)
        worker = tpr_agent_worker_new(agent, name, hash);
    tpr_os_lock_give(&agent->lock);
    return worker;
}

// ---- a call

static tprpc_status tpr_agent_call_begin(tpr_agent_worker *worker, const char *method_name,
                                         const tprpc_call_options *options, tpr_agent_call **out, tprpc_error *error) {
    tprpc_agent *agent = worker->agent;
    tpr_agent_loop *on = tpr_agent_on(agent, worker->loop);
    uint32_t limit = agent->ctx->limits.pending_calls;
    if (TPR_UNLIKELY(on->active >= limit))
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "%u calls are pending (limits.pending_calls)",
                               (unsigned)limit);
    tpr_agent_call *call = (tpr_agent_call *)(void *)tpr_base_slab_take(&on->calls);
    if (!call && on->calls.used >= on->calls.limit)
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "%u calls are pending (limits.pending_calls), or have "
                               "ended and were not released", (unsigned)on->calls.used);
    if (!call) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a call");
    call->streams = NULL;
    call->stream_count = options->stream_count;
    if (TPR_UNLIKELY(options->stream_count)) {
        size_t size = options->stream_count * sizeof *call->streams;
        call->streams = (tprpc_stream *)tpr_base_pool_alloc(&worker->loop->pool, size);
        if (!call->streams) {
            tpr_base_slab_give(&on->calls, &call->slot);
            return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for the call's streams");
        }
        memcpy(call->streams, options->streams, size);
    }
    call->worker = worker;             // field by field: a memset of so much takes longer than all the rest
    call->refs = 1;
    call->method_name = method_name;
    call->timer.run = tpr_agent_call_timed_out;
    call->timer.state = TPR_TIMER_IDLE;
    call->task.begin = NULL;
    call->task.run = tpr_agent_done_run;
    call->task.done = tpr_agent_done_over;
    call->task.busy = NULL;
    call->flags = options->flags;
    call->done = call->awaited = call->reading = call->parked = call->has_future = false;
    call->status = TPRPC_OK;
    call->error = NULL;
    call->in = NULL;
    call->placing = NULL;
    call->on_done = options->on_done;
    call->place = options->place;
    call->on_unplaced = options->on_unplaced;
    call->user = options->user;
    call->timeout_ms = tpr_context_time(options->timeout_ms, agent->timeout_ms);
    tpr_base_list_add(&worker->calls, &call->node);
    on->started++;
    tpr_agent_call_active(call, on, true);
    *out = call;
    return TPRPC_OK;
}

static tprpc_status tpr_agent_usable(tprpc_agent *agent, tprpc_error *error) {
    tpr_agent_state state = tpr_agent_state_of(agent);
    if (TPR_LIKELY(state == TPR_AGENT_READY || state == TPR_AGENT_LEAVING)) return TPRPC_OK;
    if (state == TPR_AGENT_LEFT)
        return tprpc_error_set(error, TPRPC_ERROR_CLOSED, 0, "%s has left the group", agent->name);
    return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "%s has not joined its group yet", agent->name);
}

// Begins a call, with the lock of the worker's loop.
static tprpc_status tpr_agent_call_on(tpr_agent_worker *worker, uint32_t method, const char *method_name,
                                      const tprpc_message *message, const tprpc_call_options *options,
                                      tprpc_future *out, tprpc_error *error) {
    tprpc_agent *agent = worker->agent;
    tpr_loop *loop = worker->loop;
    tpr_wire_call prefix;
    tpr_agent_call *call = NULL;
    tprpc_status status = tpr_agent_worker_connect(worker, error);
    if (status == TPRPC_OK)
        status = tpr_pipe_check(message, worker->pipe->message_bytes, worker->pipe->metadata_bytes,
                                worker->pipe->tensors, error);
    if (status == TPRPC_OK && message->payload_count)
        status =
            tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "payloads are for pipes: a call has a body and tensors");
    if (status == TPRPC_OK) status = tpr_agent_call_begin(worker, method_name, options, &call, error);
    if (status != TPRPC_OK) return status;
    uint64_t id = tpr_agent_id(&call->slot, loop);
    bool one_way = (options->flags & TPRPC_CALL_ONE_WAY) != 0;
    prefix.kind = TPR_WIRE_CALL;
    prefix.flags = one_way ? TPR_WIRE_CALL_ONE_WAY : 0;
    prefix.method = method;
    prefix.lane = options->lane;
    prefix.timeout_ms = call->timeout_ms > 0 && call->timeout_ms < UINT32_MAX ? (uint32_t)call->timeout_ms : 0;
    prefix.id = id;
    call->refs++;                      // this function's
    if (out) call->refs++;
    call->has_future = out != NULL;
    status = tpr_agent_send_call(worker, &prefix, message, options, id, error);
    if (status != TPRPC_OK && !call->done) {   // as if it had not been; else its outcome is on its way
        call->on_done = NULL;
        call->done = true;
        tpr_base_list_remove(&call->node);
        call->refs = 1;
        tpr_agent_on(agent, loop)->started--;
        tpr_agent_call_active(call, tpr_agent_on(agent, loop), false);
        tpr_agent_call_unref(agent, call);
        return status;
    }
    if (!call->done && call->timeout_ms >= 0 && call->timeout_ms != INT64_MAX) {
        int64_t due = tpr_context_deadline(tpr_loop_clock(loop), call->timeout_ms);
        if (due != INT64_MAX) tpr_loop_timer(loop, &call->timer, due);
    }
    if (out) {
        out->owner = agent;
        out->id = id;
    }
    tpr_agent_call_unref(agent, call);
    return TPRPC_OK;
}

// method_name NULL: that of a method that was resolved.
static tprpc_status tpr_agent_call_to(tprpc_agent *agent, tpr_agent_worker *worker, uint32_t method,
                                      const char *method_name, const tprpc_message *message,
                                      const tprpc_call_options *options, tprpc_future *out, tprpc_error *error) {
    static const tprpc_message empty = TPR_ZERO;
    static const tprpc_call_options defaults = TPR_ZERO;
    if (!message) message = &empty;
    if (!options) options = &defaults;
    tprpc_status status = TPR_UNLIKELY(options->stream_count) ? tpr_agent_check_streams(agent->ctx, options, error)
                                                              : TPRPC_OK;
    tpr_loop_enter(worker->loop);
    if (status == TPRPC_OK) status = tpr_agent_usable(agent, error);   // under the lock: destroy ends what began before
    if (!method_name) method_name = (const char *)tpr_base_map_get(&agent->resolved, method);
    if (status == TPRPC_OK)
        status = method_name ? tpr_agent_call_on(worker, method, method_name, message, options, out, error)
                 : tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the id is of no method that was resolved here");
    tpr_loop_leave(worker->loop);
    if (TPR_UNLIKELY(status != TPRPC_OK) && method_name) {
        tprpc_error cause = *error;
        tprpc_error_set(error, status, cause.os_code, "calling %s on %s: %.180s", method_name, worker->name,
                        cause.text);
    }
    return status;
}

// ---- requests that came in

static void tpr_agent_server_unref(tpr_agent_server *server) {
    if (--server->refs) return;
    tpr_base_list_remove(&server->node);
    tpr_base_map_clear(&server->by_call);
    tpr_agent_free(server->agent, server, sizeof *server);
}

static void tpr_agent_request_unref(tpr_agent_request *request) {
    tpr_agent_server *server = request->server;
    tprpc_agent *agent = server->agent;
    if (--request->refs) return;
    if (request->placing) tpr_agent_unplace(request->placing, request->in);   // its handler has not begun
    else if (request->in) tpr_pipe_in_free(request->in);
    request->in = NULL;
    request->placing = NULL;
    tpr_agent_method_unref(agent, request->method);
    tpr_base_slab_give(&tpr_agent_on(agent, server->loop)->requests, &request->slot);
    tpr_agent_server_unref(server);
}

// A request needs no answer any more: it was given, or nobody waits for it. Its message goes once no handler looks at
// it.
static void tpr_agent_request_over(tpr_agent_request *request) {
    if (request->answered) return;
    request->answered = true;
    tpr_agent_on(request->server->agent, request->server->loop)->unanswered--;
    if (request->kept) tpr_agent_on(request->server->agent, request->server->loop)->async_now--;
    tpr_base_list_remove(&request->node);
    tpr_base_list_remove(&request->lane_node);
    if (request->mapped && tpr_base_map_get(&request->server->by_call, request->call) == request)
        tpr_base_map_remove(&request->server->by_call, request->call);
    tpr_agent_request_unref(request);
}

TPR_COLD static void tpr_agent_request_fail(tpr_agent_request *request, tprpc_status status, int32_t user_code,
                                   const char *text) {
    tpr_agent_server *server = request->server;
    if (request->answered) return;
    tpr_agent_on(server->agent, server->loop)->received_failed++;
    if (!request->one_way && !request->cancelled && server->pipe)
        tpr_agent_say_error(server->agent, server->pipe, request->call, status, user_code, text);
    tpr_agent_request_over(request);
}

static tprpc_request tpr_agent_request_handle(const tpr_agent_request *request) {
    tprpc_request handle;
    handle.owner = request->server->agent;
    handle.id = tpr_agent_id(&request->slot, request->server->loop);
    return handle;
}

static void tpr_agent_lane_next(tpr_agent_server *server, uint32_t lane);

// Before the handler, under the lock, on the thread that runs it. It leaves its lane no sooner, for threads and an
// engine may begin what they are given in any order.
static void tpr_agent_handler_begin(tpr_loop_task *task) {
    tpr_agent_request *request = TPR_CONTAINER(task, tpr_agent_request, task);
    tpr_agent_frame_begin(tpr_agent_on(request->server->agent, request->server->loop), &request->frame);
    if (!request->lane) return;
    tpr_base_list_remove(&request->lane_node);
    tpr_agent_lane_next(request->server, request->lane);
}

// The handler itself, without the lock, on whatever thread it was given to.
static void tpr_agent_handler_run(tpr_loop_task *task) {
    tpr_agent_request *request = TPR_CONTAINER(task, tpr_agent_request, task);
    tpr_agent_method *method = request->method;
    if (!request->frame.live) return;
    TPRPC_ZONE_BEGIN("tprpc handler");
    method->desc.handler(tpr_agent_request_handle(request), &request->in->message, method->desc.user);
    TPRPC_ZONE_END("tprpc handler");
}

// After the handler, under the lock.
static void tpr_agent_handler_over(tpr_loop_task *task) {
    tpr_agent_request *request = TPR_CONTAINER(task, tpr_agent_request, task);
    tpr_agent_loop *on = tpr_agent_on(request->server->agent, request->server->loop);
    char text[200];
    request->running = false;
    tpr_base_list_remove(&request->frame.node);
    on->sends--;
    if (!request->frame.live) {
        tpr_agent_request_fail(request, TPRPC_ERROR_NO_METHOD, 0, "");
    } else if (!request->answered && !request->kept) {
        snprintf(text, sizeof text, "the handler of %s returned without answering or keeping the request",
                 request->method->name);
        tpr_agent_request_fail(request, TPRPC_ERROR_REMOTE, 0, text);
    }
    tpr_agent_request_unref(request);
}

// ---- blocking handlers: the engine's jobs, or the agent's own threads

static void tpr_agent_job(void *arg) {
    tpr_agent_request *request = (tpr_agent_request *)arg;
    tpr_loop *loop = request->server->loop;
    tprpc_agent *agent = request->server->agent;
    tpr_loop_enter(loop);
    tpr_agent_handler_begin(&request->task);
    tpr_loop_leave(loop);
    tpr_agent_handler_run(&request->task);
    TPR_ATOMIC_ADD(&loop->deferring, 1u);   // once this is over agent and context may go, but for the loop
    tpr_loop_enter(loop);
    tpr_agent_handler_over(&request->task);
    TPR_ATOMIC_SUB(&agent->jobs, 1u);
    tpr_loop_notify(loop);
    tpr_loop_leave(loop);
    TPR_ATOMIC_SUB(&loop->deferring, 1u);
}

TPR_COLD static void tpr_agent_submit_again(tprpc_work *work) {
    tpr_agent_request *request = TPR_CONTAINER(work, tpr_agent_request, retry);
    tpr_loop_post_place(request->server->loop, &request->task);
}

static void tpr_agent_submit_later(tpr_agent_request *request, tpr_loop *loop) {
    tpr_loop_enter(loop);
    tpr_loop_timer(loop, &request->retry, tpr_loop_clock(loop) + 1000);
    tpr_loop_leave(loop);
}

// Hands a request to the engine, without the lock: whichever thread drives does it. The engine's queue may be full:
// then it is asked again in a millisecond.
static void tpr_agent_submit_place(tpr_loop_task *task) {
    tpr_agent_request *request = TPR_CONTAINER(task, tpr_agent_request, task);
    tpr_loop *loop = request->server->loop;
    tprpc_context *ctx = request->server->agent->ctx;
    if (TPR_ATOMIC_LOAD(&request->server->agent->closing)) tpr_agent_job(request);   // the engine may take no jobs now
    else if (ctx->submit(tpr_agent_job, request, ctx->user)) return;   // from here on the job's
    else tpr_agent_submit_later(request, loop);
}

#ifndef TPRPC_NO_THREADS
TPR_COLD static void tpr_agent_thread_main(void *arg) {
    tpr_agent_thread *self = (tpr_agent_thread *)arg;
    tprpc_agent *agent = self->agent;
    tprpc_context *ctx = agent->ctx;
    if (ctx->thread_begin) ctx->thread_begin(self->name, ctx->user);
    tpr_os_lock_take(&agent->lock);
    while (!agent->stopping || agent->job_head) {
        tpr_agent_request *request = agent->job_head;
        if (request) {
            agent->job_head = request->next_job;
            if (!agent->job_head) agent->job_tail = &agent->job_head;
        }
        uint32_t signal = TPR_ATOMIC_LOAD(&agent->job_signal);
        tpr_os_lock_give(&agent->lock);
        if (request) tpr_agent_job(request);
        else tpr_os_futex_wait(&agent->job_signal, signal, -1);
        tpr_os_lock_take(&agent->lock);
    }
    tpr_os_lock_give(&agent->lock);
    if (ctx->thread_end) ctx->thread_end(self->name, ctx->user);
}
#endif

static void tpr_agent_queue_job(tprpc_agent *agent, tpr_agent_request *request) {
    tpr_os_lock_take(&agent->lock);
    request->next_job = NULL;
    *agent->job_tail = request;
    agent->job_tail = &request->next_job;
    TPR_ATOMIC_ADD(&agent->job_signal, 1u);
    tpr_os_lock_give(&agent->lock);
    tpr_os_futex_wake(&agent->job_signal, 1);
}

// ---- starting requests, in the order of their lanes

static void tpr_agent_request_go(tpr_agent_request *request);

static void tpr_agent_request_start(tpr_agent_request *request) {
    if (request->placing) tpr_agent_placing_free(request->placing);   // from here on the memory is the handler's
    request->placing = NULL;
    request->running = true;
    request->refs++;
    tpr_agent_on(request->server->agent, request->server->loop)->sends++;
    tpr_agent_request_go(request);
}

// Runs the handler of a request that was started, or has it run.
static void tpr_agent_request_go(tpr_agent_request *request) {
    tpr_agent_server *server = request->server;
    tprpc_agent *agent = server->agent;
    tpr_agent_loop *on = tpr_agent_on(agent, server->loop);
    bool blocking = (request->method->desc.flags & TPRPC_METHOD_BLOCKING) != 0;
    if (TPR_UNLIKELY(on->held || tpr_agent_state_of(agent) == TPR_AGENT_STARTING)) {
        request->next_job = NULL;      // a caller may be ready first: until this end is, handlers could not call
        *on->held_tail = request;
        on->held_tail = &request->next_job;
        return;
    }
    request->retry.run = tpr_agent_submit_again;
    request->task.begin = tpr_agent_handler_begin;
    request->task.run = tpr_agent_handler_run;
    request->task.done = tpr_agent_handler_over;
    request->task.busy = NULL;
    if (blocking && agent->thread_count) {
        TPR_ATOMIC_ADD(&agent->jobs, 1u);
        tpr_agent_queue_job(agent, request);
    } else if (blocking && agent->ctx->submit) {
        TPR_ATOMIC_ADD(&agent->jobs, 1u);
        request->task.begin = NULL;
        request->task.run = tpr_agent_submit_place;
        request->task.done = NULL;
        tpr_loop_post_place(server->loop, &request->task);
    } else {
        tpr_loop_post(server->loop, &request->task);
    }
}

// Runs what was held on a loop while the agent started. Under its lock; the start is over.
static void tpr_agent_held_go(tprpc_agent *agent, tpr_loop *loop) {
    tpr_agent_loop *on = tpr_agent_on(agent, loop);
    tpr_agent_request *request = on->held, *next;
    on->held = NULL;
    on->held_tail = &on->held;
    for (; request; request = next) {
        next = request->next_job;
        tpr_agent_request_go(request);
    }
}

// The same on all loops, under the first one's lock.
static void tpr_agent_held_go_all(tprpc_agent *agent) {
    tpr_agent_held_go(agent, tpr_agent_home(agent));
    for (uint32_t i = 1; i < agent->ctx->loop_count; i++) {
        tpr_loop_enter(&agent->ctx->loops[i]);
        tpr_agent_held_go(agent, &agent->ctx->loops[i]);
        tpr_os_lock_give(&agent->ctx->loops[i].lock);   // the log is for whoever holds no other
    }
}

// Starts the first request of a lane, once it is whole.
static void tpr_agent_lane_next(tpr_agent_server *server, uint32_t lane) {
    for (tpr_base_list *node = server->lanes.next; node != &server->lanes; node = node->next) {
        tpr_agent_request *request = TPR_CONTAINER(node, tpr_agent_request, lane_node);
        if (request->lane != lane) continue;
        if (request->whole && !request->running) tpr_agent_request_start(request);
        return;
    }
}

// A request's bytes are there, or will not come.
static void tpr_agent_request_read(tpr_pipe_in *in) {
    tpr_agent_request *request = (tpr_agent_request *)in->user;
    tpr_agent_server *server = request->server;
    bool good = in->status == TPRPC_OK && !request->answered && !request->cancelled;
    request->reading = false;
    server->refs++;
    if (good) {
        request->whole = true;
        if (request->lane) tpr_agent_lane_next(server, request->lane);
        else tpr_agent_request_start(request);
    } else {
        tpr_agent_request_fail(request, in->status == TPRPC_OK ? TPRPC_ERROR_CANCELLED : in->status, 0, in->error.text);
        if (request->lane) tpr_agent_lane_next(server, request->lane);
    }
    tpr_agent_request_unref(request);
    tpr_agent_server_unref(server);
}

static void tpr_agent_request_placed(tpr_loop_task *task) {
    tpr_agent_placing *placing = TPR_CONTAINER(task, tpr_agent_placing, task);
    tpr_base_list_remove(&placing->frame.node);
    tpr_agent_request *request = (tpr_agent_request *)placing->owner;
    bool refuse = placing->status != TPRPC_OK || request->cancelled;
    tprpc_message allocation = tpr_agent_placed(placing, request->in);
    request->parked = false;
    if (placing->status == TPRPC_ERROR_NO_METHOD) tpr_agent_request_fail(request, TPRPC_ERROR_NO_METHOD, 0, "");
    else if (placing->status != TPRPC_OK)
        tpr_agent_request_fail(request, placing->status, 0, "place refused the message");
    tprpc_pipe *pipe = request->in->pipe;
    tpr_pipe_in_read(request->in, &allocation, refuse, tpr_agent_request_read);
    tpr_pipe_unref(pipe);
}

static void tpr_agent_on_call(tpr_agent_server *server, const tpr_wire_call *prefix, tpr_pipe_in *in) {
    tprpc_agent *agent = server->agent;
    tpr_agent_loop *on = tpr_agent_on(agent, server->loop);
    bool one_way = (prefix->flags & TPR_WIRE_CALL_ONE_WAY) != 0;   // of those some may be on their way when all leave
    bool left = !one_way && tpr_agent_state_of(agent) == TPR_AGENT_LEFT;
    tpr_agent_method *method = left ? NULL : tpr_agent_method_take(agent, prefix->method);
    tpr_agent_request *request = method && on->unanswered < agent->ctx->limits.pending_calls
                                     ? (tpr_agent_request *)(void *)tpr_base_slab_take(&on->requests) : NULL;
    on->received++;
    if (!request) {
        on->received_failed++;
        server->refs++;                // both of what follows may end its pipe
        tpr_agent_drop_in(in);
        if (!one_way && server->pipe)
            tpr_agent_say_error(agent, server->pipe, prefix->id,
                                left ? TPRPC_ERROR_NO_WORKER : method ? TPRPC_ERROR_LIMIT : TPRPC_ERROR_NO_METHOD, 0,
                                left ? "it has left the group" : method ? "it has too many requests pending" : "");
        if (method) tpr_agent_method_unref(agent, method);
        tpr_agent_server_unref(server);
        return;
    }
    on->unanswered++;
    request->server = server;          // field by field, as in a call
    request->method = method;
    request->call = prefix->id;
    request->lane = prefix->lane;
    request->one_way = one_way;
    request->parked = request->whole = request->running = false;
    request->kept = request->cancelled = request->answered = request->mapped = false;
    request->retry.state = TPR_TIMER_IDLE;
    request->placing = NULL;
    request->next_job = NULL;
    request->frame.method = method;
    tpr_base_list_init(&request->frame.node);
    request->in = in;
    request->refs = 2;                 // until it is answered; until it is read
    request->reading = true;
    server->refs++;
    in->user = request;
    tpr_base_list_init(&request->lane_node);
    tpr_base_list_add(&server->requests, &request->node);
    if (request->lane) tpr_base_list_add(&server->lanes, &request->lane_node);
    if (method->desc.place && in->message.tensor_count) {
        request->parked = true;
        request->placing = tpr_agent_place(agent, in, method->desc.place, method->desc.on_unplaced, method->desc.user,
                                           request, tpr_agent_request_placed);
        if (request->placing) {
            TPR_ATOMIC_ADD(&method->refs, 1u);
            request->placing->frame.method = method;
            request->placing->placement.worker = server->caller;
            request->placing->placement.method = method->name;
            request->placing->placement.request = tpr_agent_request_handle(request);
            return;
        }
        tpr_agent_request_fail(request, TPRPC_ERROR_MEMORY, 0, "no memory to place the message");
        request->parked = false;
    }
    tpr_pipe_in_read(in, NULL, request->answered, tpr_agent_request_read);
}

// The request of a call that its caller cancels. Most are answered before, so only now they enter the map by their
// calls' numbers: all since the last look, which are the newest. A million may be pending, and be cancelled at once.
static tpr_agent_request *tpr_agent_request_called(tpr_agent_server *server, uint64_t call) {
    for (tpr_base_list *i = server->requests.prev; i != &server->requests; i = i->prev) {
        tpr_agent_request *request = TPR_CONTAINER(i, tpr_agent_request, node);
        if (request->mapped || !tpr_base_map_put(&server->by_call, request->call, request)) break;
        request->mapped = true;        // without memory it is not found: its caller does not wait for it anyhow
    }
    return (tpr_agent_request *)tpr_base_map_get(&server->by_call, call);
}

static void tpr_agent_on_cancel(tpr_agent_server *server, uint64_t call) {
    tpr_agent_request *request = tpr_agent_request_called(server, call);
    if (!request) return;
    request->cancelled = true;
    if (request->reading && !request->parked) tpr_agent_abort_in(request->in);
}

static void tpr_agent_server_message(tpr_pipe_user *user, tpr_pipe_in *in) {
    tpr_agent_server *server = (tpr_agent_server *)(void *)user;
    tprpc_agent *agent = server->agent;
    tpr_wire_call prefix;
    char name[TPR_AGENT_NAME];
    uint32_t rank;
    bool good = tpr_wire_get_call(in->prefix, in->prefix_size, &prefix);
    if (good && prefix.kind == TPR_WIRE_CALL && server->caller && !in->message.payload_count) {
        tpr_agent_on_call(server, &prefix, in);
        return;
    }
    if (good && prefix.kind == TPR_WIRE_INTRO && !server->caller &&
        tpr_wire_get_intro(in->message.metadata, in->message.metadata_size, name, sizeof name, &rank)) {
        server->caller = tpr_agent_text_locked(agent, name);
        good = server->caller != NULL;
    } else if (good && prefix.kind == TPR_WIRE_CANCEL && server->caller) {
        tpr_agent_on_cancel(server, prefix.id);
    } else {
        good = false;
    }
    if (!good) tpr_pipe_end(server->pipe, TPRPC_ERROR_PROTOCOL, 0, "the caller sent something else than calls");
    tpr_agent_drop_in(in);             // after that, for it may end the pipe, and the server go with it
}

TPR_COLD static void tpr_agent_server_ended(tpr_pipe_user *user) {
    tpr_agent_server *server = (tpr_agent_server *)(void *)user;
    tprpc_pipe *pipe = server->pipe;
    server->pipe = NULL;
    for (tpr_base_list *i = server->requests.next; i != &server->requests; i = i->next)
        TPR_CONTAINER(i, tpr_agent_request, node)->cancelled = true;
    tpr_agent_count_pipe(tpr_agent_on(server->agent, server->loop), pipe);
    pipe->closed = true;
    pipe->user = NULL;
    tpr_agent_server_unref(server);
}

// A caller's pipe has come in.
static tpr_pipe_user *tpr_agent_serve(void *arg, tprpc_pipe *pipe) {
    tprpc_agent *agent = (tprpc_agent *)arg;
    tpr_agent_server *server = (tpr_agent_server *)tpr_agent_alloc(agent, sizeof *server);
    if (!server) return NULL;
    server->user.message = tpr_agent_server_message;
    server->user.ended = tpr_agent_server_ended;
    server->agent = agent;
    server->loop = pipe->loop;
    server->pipe = pipe;
    server->refs = 1;
    server->by_call.memory = &agent->ctx->env.memory;
    tpr_base_list_init(&server->requests);
    tpr_base_list_init(&server->lanes);
    tpr_base_list_add(&tpr_agent_on(agent, pipe->loop)->servers, &server->node);
    return &server->user;
}

// ---- answers

static tpr_agent_request *tpr_agent_request_of(tprpc_agent *agent, tpr_loop *loop, uint64_t id) {
    tpr_agent_request *request = (tpr_agent_request *)(void *)tpr_agent_find(&tpr_agent_on(agent, loop)->requests, id);
    return request && !request->answered ? request : NULL;
}

// Answers a request: with a message, which may be the request's own and go with it, or with an error when it is NULL.
static tprpc_status tpr_agent_answer(tprpc_request handle, const tprpc_message *message, int32_t user_code,
                                     const char *why) {
    tprpc_agent *agent = (tprpc_agent *)handle.owner;
    tpr_loop *loop = tpr_agent_loop_of(handle.owner, handle.id);
    void (*release)(void *user) = message ? message->release : NULL;
    void *release_user = message ? message->release_user : NULL;
    tprpc_error error;
    tprpc_status status = TPRPC_ERROR_INVALID;
    if (loop) {
        tpr_loop_enter(loop);
        tpr_agent_request *request = tpr_agent_request_of(agent, loop, handle.id);
        if (request && request->cancelled) {
            tpr_agent_request_over(request);
        } else if (request && tpr_agent_state_of(agent) == TPR_AGENT_LEFT) {
            tpr_agent_request_fail(request, TPRPC_ERROR_PEER, 0, "the worker has left the group");
        } else if (request && !message) {
            status = TPRPC_OK;
            tpr_agent_request_fail(request, TPRPC_ERROR_REMOTE, user_code, why ? why : "");
        } else if (request) {
            tprpc_pipe *pipe = request->server->pipe;
            tpr_wire_call prefix = {TPR_WIRE_REPLY, 0, 0, 0, 0, request->call};
            status = tpr_pipe_check(message, pipe->message_bytes, pipe->metadata_bytes, pipe->tensors, &error);
            if (status == TPRPC_OK && message->payload_count) status = TPRPC_ERROR_INVALID;
            if (status == TPRPC_OK && !request->one_way) {
                status = tpr_agent_send_on(agent, pipe, &prefix, message, 0, &error);
            } else if (status == TPRPC_OK && message->release) {   // nobody waits: it is only released
                tpr_agent_send *send = tpr_agent_send_new(agent, loop, message, 0);
                if (send) tpr_loop_post(loop, &send->task);
                else status = TPRPC_ERROR_MEMORY;
            }
            if (status == TPRPC_OK) tpr_agent_request_over(request);
        }
        tpr_loop_leave(loop);
    }
    if (status != TPRPC_OK && release) release(release_user);
    return status;
}

// ---- creation and destruction

// Gives back what an agent has; nothing of it is running.
static void tpr_agent_dispose(tprpc_agent *agent) {
    tprpc_context *ctx = agent->ctx;
    bool own_context = agent->own_context;
    for (uint32_t i = 0; i < tpr_agent_workers(agent); i++) {
        tpr_agent_worker *worker = tpr_agent_worker_at(agent, i);
        tpr_agent_free(agent, worker->where, sizeof *worker->where);
        tpr_agent_free(agent, worker, sizeof *worker);
    }
    for (uint32_t i = 0; i < TPR_AGENT_CHUNKS; i++)
        tpr_agent_free(agent, agent->workers[i], ((size_t)TPR_AGENT_CHUNK << i) * sizeof *agent->workers[i]);
    for (uint32_t i = 0; i < agent->methods.capacity; i++)
        tpr_agent_free(agent, agent->methods.entries[i].value, sizeof(tpr_agent_method));
    for (uint32_t i = 0; i < agent->names.capacity; i++) {
        char *text = (char *)agent->names.entries[i].value;
        if (text) tpr_agent_free(agent, text, strlen(text) + 1);
    }
    tpr_base_map_clear(&agent->methods);
    tpr_base_map_clear(&agent->names);
    tpr_base_map_clear(&agent->by_name);
    tpr_base_map_clear(&agent->resolved);
    for (uint32_t i = 0; agent->loops && i < ctx->loop_count; i++) {
        tpr_base_slab_clear(&agent->loops[i].calls);
        tpr_base_slab_clear(&agent->loops[i].requests);
    }
    tpr_agent_free(agent, agent->loops, ctx->loop_count * sizeof *agent->loops);
    tpr_agent_free(agent, agent->maps, agent->map_capacity * sizeof *agent->maps);
    tpr_agent_free(agent, agent->starts, (agent->is_static ? agent->world_size : 1) * sizeof *agent->starts);
    TPR_ATOMIC_SUB(&ctx->agents, 1u);
    tpr_agent_free(agent, agent, sizeof *agent);
    if (own_context) tprpc_context_destroy(ctx);
}

static tprpc_status tpr_agent_start_threads(tprpc_agent *agent, tprpc_error *error) {
#ifndef TPRPC_NO_THREADS
    size_t size = (size_t)agent->worker_threads * sizeof *agent->threads;
    if (agent->worker_threads == 0) return TPRPC_OK;
    agent->threads = (tpr_agent_thread *)tpr_agent_alloc(agent, size);
    if (!agent->threads) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for worker threads");
    for (int32_t i = 0; i < agent->worker_threads; i++) {
        tpr_agent_thread *thread = &agent->threads[i];
        thread->agent = agent;
        snprintf(thread->name, sizeof thread->name, "tprpc-w%d", (int)i);
        if (tpr_os_thread_start(&thread->thread, tpr_agent_thread_main, thread) != 0)
            return tpr_base_os_error(error, errno, "starting", "a worker thread");
        agent->thread_count++;
    }
    return TPRPC_OK;
#else
    return agent->worker_threads == 0 ? TPRPC_OK
           : tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "worker_threads: built with TPRPC_NO_THREADS");
#endif
}

static void tpr_agent_stop_threads(tprpc_agent *agent) {
    tpr_os_lock_take(&agent->lock);
    agent->stopping = true;
    TPR_ATOMIC_ADD(&agent->job_signal, 1u);
    tpr_os_lock_give(&agent->lock);
#ifndef TPRPC_NO_THREADS
    tpr_os_futex_wake(&agent->job_signal, INT_MAX);
    for (uint32_t i = 0; i < agent->thread_count; i++) tpr_os_thread_join(&agent->threads[i].thread);
    tpr_agent_free(agent, agent->threads, (size_t)agent->worker_threads * sizeof *agent->threads);
    agent->threads = NULL;
#endif
    agent->thread_count = 0;
}

static tprpc_status tpr_agent_check_desc(const tprpc_agent_desc *desc, tprpc_error *error) {
    const char *fault = tpr_base_name_fault(desc->name, desc->name ? strlen(desc->name) : 0, TPR_AGENT_NAME - 1);
    if (fault)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the agent's name \"%.60s\" %s",
                               desc->name ? desc->name : "", fault);
    if (desc->secret)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "a secret needs TLS, which is not in this build");
    if (!desc->init_method && !desc->store)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "agent %s has neither an init_method nor a store",
                               desc->name);
    if (desc->init_method && !desc->store && !strstr(desc->init_method, "://"))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "init_method \"%.80s\" is none such as tcp://host:port, file://path or "
                               "env://",
                               desc->init_method);
    if (desc->init_method && strlen(desc->init_method) >= TPR_AGENT_TEXT)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "agent %s: its init_method is too long", desc->name);
    if (desc->address && strlen(desc->address) >= TPR_AGENT_TEXT)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "agent %s: its address is too long", desc->name);
    if (desc->world_size < 0 || desc->world_size > 1 << 20)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "world_size is %d, not 0 to %d", (int)desc->world_size,
                               1 << 20);
    if (desc->world_size && (desc->rank < 0 || desc->rank >= desc->world_size))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "rank is %d, not 0 to %d", (int)desc->rank,
                               (int)desc->world_size - 1);
    if (desc->worker_threads < 0 || desc->worker_threads > 1024)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "worker_threads is %d, not 0 to 1024",
                               (int)desc->worker_threads);
    return TPRPC_OK;
}

TPR_COLD static tprpc_status tpr_agent_fill(tprpc_agent *agent, const tprpc_agent_desc *desc, tprpc_error *error) {
    tprpc_context *ctx = agent->ctx;
    tpr_base_memory *memory = &ctx->env.memory;
    uint32_t limit = ctx->limits.pending_calls;
    snprintf(agent->name, sizeof agent->name, "%s", desc->name);
    if (desc->init_method) snprintf(agent->init_method, sizeof agent->init_method, "%s", desc->init_method);
    if (desc->address) snprintf(agent->address, sizeof agent->address, "%s", desc->address);
    agent->is_static = desc->world_size > 0;
    agent->rank = agent->is_static ? (uint32_t)desc->rank : 0;
    agent->world_size = (uint32_t)desc->world_size;
    agent->serve_store = desc->serve_store;
    agent->insecure = desc->insecure;
    agent->store = desc->store;
    agent->timeout_ms = tpr_context_time(desc->timeout_ms, 60000);
    agent->start_timeout_ms = tpr_context_time(desc->start_timeout_ms, 60000);
    agent->worker_threads = desc->worker_threads;
    agent->job_tail = &agent->job_head;
    agent->methods.memory = agent->names.memory = agent->by_name.memory = agent->resolved.memory = memory;
    if (tpr_os_random(&agent->nonce, sizeof agent->nonce) != 0)
        return tpr_base_os_error(error, errno, "reading", "random bytes");
    agent->loops = (tpr_agent_loop *)tpr_agent_alloc(agent, ctx->loop_count * sizeof *agent->loops);
    if (!agent->loops) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for agent %s", agent->name);
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        tpr_agent_loop *on = &agent->loops[i];
        on->calls.memory = on->requests.memory = memory;
        on->calls.object_size = (uint32_t)((sizeof(tpr_agent_call) + 63) & ~(size_t)63);
        on->requests.object_size = (uint32_t)((sizeof(tpr_agent_request) + 63) & ~(size_t)63);
        on->calls.limit = on->requests.limit = limit <= UINT32_MAX / 2 ? 2 * limit : UINT32_MAX;
        tpr_base_list_init(&on->servers);
        tpr_base_list_init(&on->running);
        on->held_tail = &on->held;
    }
    return tpr_agent_start_threads(agent, error);
}

// Whether nothing of the agent's is at work on a loop, but for sends.
static bool tpr_agent_loop_rests(tpr_agent_loop *on) {
    for (uint32_t i = 0; i < on->requests.chunk_count * TPR_BASE_SLAB_CHUNK; i++) {
        tpr_agent_request *request = (tpr_agent_request *)(void *)tpr_base_slab_at(&on->requests, i);
        if (request->slot.used && (request->reading || request->running)) return false;
    }
    for (uint32_t i = 0; i < on->calls.chunk_count * TPR_BASE_SLAB_CHUNK; i++) {
        tpr_agent_call *call = (tpr_agent_call *)(void *)tpr_base_slab_at(&on->calls, i);
        if (call->slot.used && call->reading) return false;
    }
    return tpr_base_list_empty(&on->servers);
}

static bool tpr_agent_loop_idle(void *arg) {
    tpr_agent_loop *on = (tpr_agent_loop *)arg;
    return !on->sends && tpr_agent_loop_rests(on);
}

// Ends everything of the agent's on one loop; what runs is waited for by the caller. Under the lock.
static void tpr_agent_end_loop(tprpc_agent *agent, tpr_loop *loop) {
    tpr_agent_loop *on = tpr_agent_on(agent, loop);
    tpr_agent_held_go(agent, loop);
    for (uint32_t i = 0; i < tpr_agent_workers(agent); i++) {
        tpr_agent_worker *worker = tpr_agent_worker_at(agent, i);
        if (worker->loop != loop) continue;
        if (worker->op) tpr_store_cancel(agent->store, worker->op);
        if (worker->pipe) tpr_pipe_end(worker->pipe, TPRPC_ERROR_CLOSED, 0, "the agent %s was destroyed", agent->name);
    }
    for (tpr_base_list *node = on->servers.next, *next; node != &on->servers; node = next) {
        tpr_agent_server *server = TPR_CONTAINER(node, tpr_agent_server, node);
        next = node->next;
        server->refs++;
        if (server->pipe) tpr_pipe_end(server->pipe, TPRPC_ERROR_CLOSED, 0, "the agent %s was destroyed", agent->name);
        while (!tpr_base_list_empty(&server->requests)) {
            tpr_agent_request *request = TPR_CONTAINER(server->requests.next, tpr_agent_request, node);
            request->cancelled = true;
            tpr_agent_request_over(request);
        }
        if (server->node.next) next = server->node.next;
        tpr_agent_server_unref(server);
    }
}

// Waits for what runs, on this thread where the context is polled. False: all that is left is what receivers keep of
// what was given to them.
static bool tpr_agent_wait_idle(tprpc_agent *agent, tpr_loop *loop) {
    tpr_agent_loop *on = tpr_agent_on(agent, loop);
    const int64_t patience = tpr_loop_clock(loop) + TPR_AGENT_PATIENCE_US;
    while (!tpr_loop_wait(loop, tpr_agent_loop_idle, on, tpr_loop_clock(loop) + 10000) ||
           TPR_ATOMIC_LOAD(&agent->jobs)) {
        tpr_loop_give_way(loop);   // to the loop's thread, whose callback is waited for
        const bool jobs = TPR_ATOMIC_LOAD(&agent->jobs) != 0;
        if (!jobs && on->gifts && on->gifts == on->sends && tpr_agent_loop_rests(on) && tpr_loop_clock(loop) > patience)
            return false;
        if (!jobs) continue;
        tpr_loop_leave(loop);
        tpr_os_futex_wait(&agent->jobs, TPR_ATOMIC_LOAD(&agent->jobs), 1000);
        tpr_loop_enter(loop);
    }
    for (uint32_t i = 0; i < on->calls.chunk_count * TPR_BASE_SLAB_CHUNK; i++) {   // futures that were not released
        tpr_agent_call *call = (tpr_agent_call *)(void *)tpr_base_slab_at(&on->calls, i);
        if (!call->slot.used) continue;
        call->refs = 1;
        tpr_agent_call_unref(agent, call);
    }
    return true;
}

// Looks both names up for a call. Refusals go to `error`, and to the caller's.
static tprpc_status tpr_agent_resolve(tprpc_agent *agent, const char *worker, const char *method, tpr_agent_worker **to,
                                      const char **text, tprpc_error *error) {
    *to = tpr_agent_worker_of(agent, worker, !agent->is_static);
    tprpc_status status = *to ? TPRPC_OK : tpr_agent_usable(agent, error);   // nobody is known before it has joined
    if (status != TPRPC_OK) return status;
    if (!*to)
        return tprpc_error_set(error, TPRPC_ERROR_NO_WORKER, 0, "there is no worker \"%.100s\" in the group of %s",
                               worker, agent->name);
    const char *fault = tpr_base_name_fault(method, strlen(method), TPR_AGENT_NAME - 1);
    if (fault) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the method name \"%.60s\" %s", method, fault);
    *text = tpr_agent_text_locked(agent, method);
    return *text ? TPRPC_OK : tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a method's name");
}

TPR_COLD
static tprpc_status tpr_agent_refused(tprpc_status status, const tprpc_error *error, const tprpc_message *message,
                                      const tprpc_call_options *options) {
    if (status == TPRPC_OK) return status;
    if (options && options->error) *options->error = *error;
    if (message && message->release) message->release(message->release_user);
    return status;
}

// NULL: it is stale, which it is once it was released, whether or not its call goes on.
static inline tpr_agent_call *tpr_agent_future(tprpc_future future, tpr_loop *loop) {
    tprpc_agent *agent = (tprpc_agent *)future.owner;
    tpr_agent_call *call = (tpr_agent_call *)(void *)tpr_agent_find(&tpr_agent_on(agent, loop)->calls, future.id);
    return call && call->has_future ? call : NULL;
}

typedef struct tpr_agent_waiting {
    const tprpc_future *futures;
    size_t count, which;
    bool several;                      // loops that they are on
    tpr_loop *loop;
    tpr_agent_call *call;              // of the future that ended the wait; NULL: that is stale
} tpr_agent_waiting;

// Whether one of the futures on this loop has its outcome, or is none.
static bool tpr_agent_any_done(void *arg) {
    tpr_agent_waiting *waiting = (tpr_agent_waiting *)arg;
    for (size_t i = 0; i < waiting->count; i++) {
        tprpc_future future = waiting->futures[i];
        if (waiting->several && tpr_agent_loop_of(future.owner, future.id) != waiting->loop) continue;
        waiting->call = tpr_agent_future(future, waiting->loop);
        waiting->which = i;
        if (!waiting->call || waiting->call->done) return true;
        waiting->call->awaited = true;
    }
    return false;
}

// The loop whose thread the calling one is, when that waits in a callback for a future on `other`; else NULL. A
// polled context has one loop, and a thread of a loop never changes.
static tpr_loop *tpr_agent_own_loop(const tpr_loop *other) {
    tprpc_context *ctx = other->context;
    for (uint32_t i = 0; ctx->loop_count > 1 && i < ctx->loop_count; i++)
        if (&ctx->loops[i] != other && TPR_ATOMIC_LOAD(&ctx->loops[i].callback_thread) == tpr_os_thread_id())
            return &ctx->loops[i];
    return NULL;
}

// Goes on with the loop of a callback that waits for another loop's future: two callbacks may wait for each other's
// loop, and it takes a third that answers both. False: they are nested too deep.
static bool tpr_agent_go_on(tpr_loop *own) {
    tpr_loop_enter(own);
    bool allowed = own->depth <= own->env->nesting;
    if (allowed) tpr_loop_poll(own, INT64_MIN, INT64_MAX);
    tpr_loop_leave(own);
    return allowed;
}

// Whether a user's function of the method (NULL: of any) is running; *inside: on this thread.
static bool tpr_agent_method_runs(tprpc_agent *agent, const tpr_agent_method *method, bool *inside) {
    bool runs = false;
    for (uint32_t i = 0; i < agent->ctx->loop_count; i++) {
        tpr_agent_loop *on = &agent->loops[i];
        tpr_loop_enter(&agent->ctx->loops[i]);
        for (tpr_base_list *node = on->running.next; node != &on->running; node = node->next) {
            const tpr_agent_frame *frame = TPR_CONTAINER(node, tpr_agent_frame, node);
            if (method && frame->method != method) continue;
            runs = true;
            *inside |= frame->thread == tpr_os_thread_id();
        }
        tpr_loop_leave(&agent->ctx->loops[i]);
    }
    return runs;
}

// The request, with its loop's lock where there is a loop; NULL: it is stale.
static tpr_agent_request *tpr_agent_request_enter(tprpc_request handle, tpr_loop **loop) {
    *loop = tpr_agent_loop_of(handle.owner, handle.id);
    if (!*loop) return NULL;
    tpr_loop_enter(*loop);
    return tpr_agent_request_of((tprpc_agent *)handle.owner, *loop, handle.id);
}

static void tpr_agent_request_exit(tpr_loop *loop) { if (loop) tpr_loop_leave(loop); }

// Adds entries to the device map, or replaces those of the same worker and device: all of them, or none.
static tprpc_status tpr_agent_add_maps(tprpc_agent *agent, const char *worker, const tprpc_device *from,
                                       const tprpc_device *to, size_t count, tprpc_error *error) {
    size_t most = agent->map_count + count;
    const char *name = worker ? tpr_agent_text_locked(agent, worker) : NULL;
    tpr_agent_map *maps = agent->maps;
    if (most > agent->map_capacity)
        maps = most <= 65536 ? (tpr_agent_map *)tpr_agent_alloc(agent, most * sizeof *maps) : NULL;
    if (count && (!maps || (worker && !name)))
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a device map of %zu entries", most);
    if (maps != agent->maps) {
        if (agent->map_count) memcpy(maps, agent->maps, agent->map_count * sizeof *maps);
        tpr_agent_free(agent, agent->maps, agent->map_capacity * sizeof *agent->maps);
        agent->maps = maps;
        agent->map_capacity = (uint32_t)most;
    }
    for (size_t i = 0; i < count; i++) {
        tprpc_device device = tpr_pipe_device(from[i]);
        uint32_t at = 0;
        while (at < agent->map_count && (maps[at].worker != name || !tpr_pipe_same_device(maps[at].from, device)))
            at++;
        maps[at].worker = name;
        maps[at].from = device;
        maps[at].to = to[i];
        if (at == agent->map_count) agent->map_count++;
    }
    return TPRPC_OK;
}

// ---- public

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_create_for(const tprpc_agent_desc *desc, size_t desc_size, int32_t version,
                                              tprpc_agent **out, tprpc_error *error) {
    tprpc_context *ctx = NULL;
    TPRPC_ASSERT(out);
    if (!out) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_agent_create: out is NULL");
    *out = NULL;
    if (desc_size != sizeof *desc || version / 100 != TPRPC_VERSION / 100)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "the caller was built with tprpc.h %d and an agent descriptor of %zu "
                               "bytes, the library is %d with %zu: build both from one tprpc.h",
                               (int)version, desc_size, TPRPC_VERSION, sizeof *desc);
    TPRPC_ASSERT(desc);
    if (!desc) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_agent_create: desc is NULL");
    tprpc_status status = tpr_agent_check_desc(desc, error);
    if (status != TPRPC_OK) return status;
    if (desc->context && !tpr_context_usable(desc->context))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the context was inherited by a fork");
    ctx = desc->context;
    if (!ctx) status = tprpc_context_create(NULL, &ctx, error);
    if (status != TPRPC_OK) return status;
    tprpc_agent *agent = (tprpc_agent *)tpr_base_new(&ctx->env.memory, sizeof *agent, (uint32_t)TPR_AGENT_TAG);
    if (!agent) {
        if (!desc->context) tprpc_context_destroy(ctx);
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for agent %s", desc->name);
    }
    agent->ctx = ctx;
    agent->own_context = !desc->context;
    TPR_ATOMIC_ADD(&ctx->agents, 1u);
    status = tpr_agent_fill(agent, desc, error);
    if (status == TPRPC_OK) {
        *out = agent;
        return TPRPC_OK;
    }
    tpr_agent_stop_threads(agent);
    tpr_agent_dispose(agent);
    return status;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_register(tprpc_agent *agent, const tprpc_method_desc *desc, tprpc_error *error) {
    TPRPC_ASSERT(agent && desc);
    if (!agent || !desc || !desc->handler || !tpr_context_usable(agent->ctx))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "tprpc_agent_register: an argument or the handler is NULL");
    const char *fault = tpr_base_name_fault(desc->name, desc->name ? strlen(desc->name) : 0, TPR_AGENT_NAME - 1);
    if (fault)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the method name \"%.60s\" %s",
                               desc->name ? desc->name : "", fault);
    tpr_agent_method *method = (tpr_agent_method *)tpr_agent_alloc(agent, sizeof *method);
    if (!method) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for method %s", desc->name);
    method->desc = *desc;
    snprintf(method->name, sizeof method->name, "%s", desc->name);
    method->desc.name = method->name;
    method->id = tpr_agent_method_id(method->name);
    method->refs = 1;
    tpr_agent_enter_all(agent);
    tpr_agent_method *other = (tpr_agent_method *)tpr_base_map_get(&agent->methods, method->id);
    bool put = !other && tpr_base_map_put(&agent->methods, method->id, method);
    tprpc_status status = TPRPC_OK;
    if (!other && !put) {
        status = tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for method %s", desc->name);
    } else if (other) {
        bool same = strcmp(other->name, desc->name) == 0;
        status = tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, same ? "method %s is registered already%s"
                                 : "method %s has the number of %s: rename one of them", desc->name,
                                 same ? "" : other->name);
    }
    tpr_agent_leave_all(agent);
    if (!put) tpr_agent_free(agent, method, sizeof *method);
    return status;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_unregister(tprpc_agent *agent, const char *name, tprpc_error *error) {
    TPRPC_ASSERT(agent && name);
    if (!agent || !name || !tpr_context_usable(agent->ctx))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_agent_unregister: an argument is NULL");
    uint32_t id = tpr_agent_method_id(name);
    tpr_agent_enter_all(agent);
    tpr_agent_method *method = (tpr_agent_method *)tpr_base_map_get(&agent->methods, id);
    if (method && strcmp(method->name, name) != 0) method = NULL;
    if (method) tpr_base_map_remove(&agent->methods, id);
    if (method) method->removed = true;
    tpr_agent_leave_all(agent);
    if (!method) return tprpc_error_set(error, TPRPC_ERROR_NO_METHOD, 0, "there is no method %s to unregister", name);
    bool inside = false, running = true;
    while (running && !inside) {       // handlers on other threads end by themselves
        running = tpr_agent_method_runs(agent, method, &inside);
        if (running && !inside) {
            uint32_t none = 0;
            tpr_os_futex_wait(&none, 0, 200);
        }
    }
    tpr_agent_method_unref(agent, method);
    return inside ? TPRPC_PENDING : TPRPC_OK;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_set_device_map(tprpc_agent *agent, const char *worker, const tprpc_device *from,
                                                  const tprpc_device *to, size_t count, tprpc_error *error) {
    TPRPC_ASSERT(agent && (!count || (from && to)));
    if (!agent || !tpr_context_usable(agent->ctx) || (count && (!from || !to)))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_agent_set_device_map: an argument is NULL");
    const char *fault = worker ? tpr_base_name_fault(worker, strlen(worker), TPR_AGENT_NAME - 1) : NULL;
    if (fault) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the worker's name \"%.60s\" %s", worker, fault);
    tprpc_status status = TPRPC_OK;
    for (size_t i = 0; i < count && status == TPRPC_OK; i++) {
        status = tpr_agent_check_device(agent->ctx, tpr_pipe_device(from[i]), "from", i, error);
        bool none = to[i].kind < TPRPC_CPU || to[i].index < 0 || (to[i].kind == TPRPC_CPU && to[i].index);
        if (status == TPRPC_OK && none)
            status = tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "to[%zu] is device %d of kind %d, which is none", i,
                                     (int)to[i].index, (int)to[i].kind);
    }
    if (status != TPRPC_OK) return status;
    tpr_loop *home = tpr_agent_home(agent);
    tpr_loop_enter(home);
    status = agent->state == TPR_AGENT_NEW ? tpr_agent_add_maps(agent, worker, from, to, count, error)
             : tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "the device map of %s is set before it starts",
                               agent->name);
    tpr_loop_leave(home);
    return status;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_get_stats(tprpc_agent *agent, tprpc_stats *out, size_t size) {
    TPRPC_ASSERT(agent && out);
    if (!agent || !out || size != sizeof *out || !tpr_context_usable(agent->ctx)) return TPRPC_ERROR_INVALID;
    memset(out, 0, sizeof *out);
    for (uint32_t l = 0; l < agent->ctx->loop_count; l++) {
        tpr_loop *loop = &agent->ctx->loops[l];
        tpr_loop_enter(loop);
        tpr_agent_loop sum = *tpr_agent_on(agent, loop);
        for (uint32_t i = 0; i < tpr_agent_workers(agent); i++) {
            tpr_agent_worker *worker = tpr_agent_worker_at(agent, i);
            if (worker->loop == loop && worker->pipe) tpr_agent_count_pipe(&sum, worker->pipe);
            out->pipes += worker->loop == loop && worker->pipe;
        }
        for (tpr_base_list *i = agent->loops[l].servers.next; i != &agent->loops[l].servers; i = i->next) {
            tpr_agent_server *server = TPR_CONTAINER(i, tpr_agent_server, node);
            if (server->pipe) tpr_agent_count_pipe(&sum, server->pipe);
            out->pipes += server->pipe != NULL;
        }
        tpr_loop_leave(loop);
        out->client_active_calls += sum.active;
        out->server_active_calls += sum.unanswered;
        out->server_active_async_calls += sum.async_now;
        out->calls += sum.started;
        out->calls_failed += sum.failed;
        out->calls_timed_out += sum.timed_out;
        out->calls_cancelled += sum.cancelled;
        out->late_replies += sum.late;
        out->requests += sum.received;
        out->requests_failed += sum.received_failed;
        out->fast_messages += sum.fast;
        out->bytes_sent += sum.bytes_sent;
        out->bytes_received += sum.bytes_received;
        out->tensor_bytes_sent += sum.tensor_sent;
        out->tensor_bytes_received += sum.tensor_received;
        out->tensor_bytes_adopted += sum.tensor_adopted;
    }
    out->memory_bytes = TPR_ATOMIC_LOAD(&agent->ctx->env.memory.used);
    out->workers = tpr_agent_workers(agent);
    return TPRPC_OK;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_get_peer_info(tprpc_agent *agent, const char *name, tprpc_pipe_info *out,
                                                 size_t size) {
    TPRPC_ASSERT(agent && name && out);
    if (!agent || !name || !out || size != sizeof *out || !tpr_context_usable(agent->ctx)) return TPRPC_ERROR_INVALID;
    tpr_agent_worker *worker = tpr_agent_worker_of(agent, name, false);
    if (!worker) return TPRPC_ERROR_NO_WORKER;
    tpr_loop_enter(worker->loop);
    tprpc_status status = worker->pipe ? TPRPC_OK : TPRPC_ERROR_UNREACHABLE;
    if (worker->pipe) tpr_pipe_info_of(worker->pipe, out);
    tpr_loop_leave(worker->loop);
    return status;
}

TPRPC_API tprpc_status tprpc_call(tprpc_agent *agent, const char *worker, const char *method,
                                  const tprpc_message *message, const tprpc_call_options *options, tprpc_future *out) {
    tprpc_error error;
    tpr_agent_worker *to = NULL;
    const char *text = NULL;
    tprpc_status status;
    TPRPC_ASSERT(agent && worker && method);
    if (out) memset(out, 0, sizeof *out);
    if (!agent || !worker || !method || !tpr_context_usable(agent->ctx)) {
        status = tprpc_error_set(&error, TPRPC_ERROR_INVALID, 0,
                                 "tprpc_call: an argument is NULL, or the agent inherited by a fork");
    } else {
        status = tpr_agent_resolve(agent, worker, method, &to, &text, &error);
        if (status == TPRPC_OK)
            status = tpr_agent_call_to(agent, to, tpr_agent_method_id(method), text, message, options, out, &error);
    }
    return tpr_agent_refused(status, &error, message, options);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_resolve(tprpc_agent *agent, const char *worker, const char *method, tprpc_method_id *out,
                                     tprpc_error *error) {
    tpr_agent_worker *to = NULL;
    const char *text = NULL;
    TPRPC_ASSERT(agent && worker && method && out);
    if (!agent || !worker || !method || !out || !tpr_context_usable(agent->ctx))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_resolve: an argument is NULL");
    tprpc_status status = tpr_agent_usable(agent, error);
    if (status == TPRPC_OK) status = tpr_agent_resolve(agent, worker, method, &to, &text, error);
    if (status != TPRPC_OK) return status;
    out->worker = to->index;
    out->method = tpr_agent_method_id(method);
    tpr_agent_enter_all(agent);        // what the number means, for errors
    bool put = tpr_base_map_put(&agent->resolved, out->method, (void *)(uintptr_t)text);
    tpr_agent_leave_all(agent);
    return put ? TPRPC_OK : tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a method's name");
}

TPRPC_API tprpc_status tprpc_call_id(tprpc_agent *agent, tprpc_method_id id, const tprpc_message *message,
                                     const tprpc_call_options *options, tprpc_future *out) {
    tprpc_error error;
    tprpc_status status = TPRPC_ERROR_INVALID;
    TPRPC_ASSERT(agent);
    if (out) memset(out, 0, sizeof *out);
    if (!agent || !tpr_context_usable(agent->ctx)) {
        tprpc_error_set(&error, status, 0, "tprpc_call_id: no agent, or one inherited by a fork");
    } else {
        tpr_agent_worker *worker = id.worker < tpr_agent_workers(agent) ? tpr_agent_worker_at(agent, id.worker) : NULL;
        if (worker) status = tpr_agent_call_to(agent, worker, id.method, NULL, message, options, out, &error);
        else tprpc_error_set(&error, status, 0, "tprpc_call_id: the id was not given by tprpc_resolve of this agent");
    }
    return tpr_agent_refused(status, &error, message, options);
}

// ---- futures

TPRPC_API tprpc_status tprpc_future_wait_any(const tprpc_future *futures, size_t count, int64_t timeout_ms,
                                             size_t *which) {
    tpr_agent_waiting waiting;
    TPRPC_ASSERT(futures && count);
    tpr_loop *first = futures && count ? tpr_agent_loop_of(futures[0].owner, futures[0].id) : NULL;
    if (!first) return TPRPC_ERROR_INVALID;
    tprpc_context *ctx = first->context;
    int64_t timeout = timeout_ms == 0 ? 0 : tpr_context_time(timeout_ms, 0), deadline = INT64_MAX;
    waiting.futures = futures;
    waiting.count = count;
    waiting.several = false;
    for (size_t i = 1; i < count; i++) {
        tpr_loop *loop = tpr_agent_loop_of(futures[i].owner, futures[i].id);
        if (!loop || loop->context != ctx) return TPRPC_ERROR_INVALID;
        waiting.several |= loop != first;
    }
    if (timeout >= 0) deadline = tpr_context_deadline(tprpc_now_us(ctx), timeout);
    tpr_loop *own = waiting.several ? NULL : tpr_agent_own_loop(first);
    bool in_slices = waiting.several || own;
    for (uint32_t i = first->index, late = 0;; i = (i + 1) % ctx->loop_count) {
        tpr_loop *loop = waiting.several ? &ctx->loops[i] : first;
        tprpc_status status = TPRPC_PENDING;
        waiting.loop = loop;
        tpr_loop_enter(loop);
        if (tpr_loop_in_callback(loop) && loop->depth > loop->env->nesting) {
            tpr_loop_leave(loop);
            return TPRPC_ERROR_LIMIT;
        }
        int64_t now = in_slices ? tpr_loop_clock(loop) : 0;
        int64_t until = in_slices && now + TPR_AGENT_SLICE_US < deadline ? now + TPR_AGENT_SLICE_US : deadline;
        if (tpr_loop_wait(loop, tpr_agent_any_done, &waiting, until)) {
            status = waiting.call ? waiting.call->status : TPRPC_ERROR_INVALID;
            if (which) *which = waiting.which;
        }
        tpr_loop_leave(loop);
        if (status != TPRPC_PENDING || !in_slices) return status;
        late += now >= deadline;       // each loop is looked at once more
        if (late >= (waiting.several ? ctx->loop_count : 1)) return status;
        if (own && !tpr_agent_go_on(own)) return TPRPC_ERROR_LIMIT;
    }
}

TPRPC_API tprpc_status tprpc_future_wait(tprpc_future future, int64_t timeout_ms) {
    return tprpc_future_wait_any(&future, 1, timeout_ms, NULL);
}

TPRPC_API tprpc_status tprpc_future_wait_all(const tprpc_future *futures, size_t count, int64_t timeout_ms) {
    tprpc_status first = TPRPC_OK;
    TPRPC_ASSERT(futures || !count);
    if (!count) return TPRPC_OK;
    if (!futures) return TPRPC_ERROR_INVALID;
    tpr_loop *loop = tpr_agent_loop_of(futures[0].owner, futures[0].id);
    if (!loop) return TPRPC_ERROR_INVALID;
    int64_t deadline = timeout_ms == TPRPC_FOREVER ? INT64_MAX
                       : tpr_context_deadline(tprpc_now_us(loop->context), tpr_context_time(timeout_ms, 0));
    for (size_t i = 0; i < count; i++) {
        int64_t left = deadline == INT64_MAX ? TPRPC_FOREVER : (deadline - tprpc_now_us(loop->context) + 999) / 1000;
        tprpc_status status = tprpc_future_wait(futures[i], deadline != INT64_MAX && left <= 0 ? TPRPC_NOW : left);
        if (status == TPRPC_PENDING) return status;
        if (first == TPRPC_OK) first = status;
    }
    return first;
}

TPRPC_API const tprpc_message *tprpc_future_reply(tprpc_future future) {
    tpr_loop *loop = tpr_agent_loop_of(future.owner, future.id);
    const tprpc_message *message = NULL;
    if (!loop) return NULL;
    tpr_loop_enter(loop);
    tpr_agent_call *call = tpr_agent_future(future, loop);
    if (call && call->done && call->status == TPRPC_OK && call->in) message = &call->in->message;
    tpr_loop_leave(loop);
    return message;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_future_error(tprpc_future future, tprpc_error *error) {
    tpr_loop *loop = tpr_agent_loop_of(future.owner, future.id);
    tprpc_status status = TPRPC_ERROR_INVALID;
    if (!loop) return tprpc_error_set(error, status, 0, "the future is none, or was released");
    tpr_loop_enter(loop);
    tpr_agent_call *call = tpr_agent_future(future, loop);
    if (call) status = call->done ? call->status : TPRPC_PENDING;
    if (call && call->done && call->error && error) *error = *call->error;
    else if (status != TPRPC_OK && status != TPRPC_PENDING)
        tprpc_error_set(error, status, 0,
                        call ? "the call failed, and no memory was left to say why" : "the future was released");
    tpr_loop_leave(loop);
    return status;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_future_cancel(tprpc_future future) {
    tpr_loop *loop = tpr_agent_loop_of(future.owner, future.id);
    tprpc_error error = TPR_ZERO;
    if (!loop) return TPRPC_ERROR_INVALID;
    tpr_loop_enter(loop);
    tpr_agent_call *call = tpr_agent_future(future, loop);
    bool pending = call && !call->done;
    if (pending) {
        tprpc_error_set(&error, TPRPC_ERROR_CANCELLED, 0, "calling %s on %s was cancelled", call->method_name,
                        call->worker->name);
        call->refs++;
        tpr_agent_cancel_at_peer(call);
        tpr_agent_call_end(call, TPRPC_ERROR_CANCELLED, &error);
        tpr_agent_call_unref((tprpc_agent *)future.owner, call);
    }
    tpr_loop_leave(loop);
    return pending ? TPRPC_OK : TPRPC_ERROR_INVALID;
}

TPRPC_API void tprpc_future_release(tprpc_future future) {
    tpr_loop *loop = tpr_agent_loop_of(future.owner, future.id);
    if (!loop) return;
    tpr_loop_enter(loop);
    tpr_agent_call *call = tpr_agent_future(future, loop);
    if (call) {
        call->has_future = false;
        tpr_agent_call_unref((tprpc_agent *)future.owner, call);
    }
    tpr_loop_leave(loop);
}

// ---- requests

TPRPC_API tprpc_status tprpc_reply(tprpc_request request, const tprpc_message *message) {
    static const tprpc_message empty = TPR_ZERO;
    return tpr_agent_answer(request, message ? message : &empty, 0, NULL);
}

TPR_COLD
TPRPC_API tprpc_status tprpc_fail(tprpc_request request, int32_t user_code, const char *why) {
    return tpr_agent_answer(request, NULL, user_code, why);
}

TPRPC_API tprpc_status tprpc_request_keep(tprpc_request handle) {
    tpr_loop *loop;
    tprpc_status status = TPRPC_ERROR_INVALID;
    tpr_agent_request *request = tpr_agent_request_enter(handle, &loop);
    if (request && request->running) {
        status = TPRPC_OK;
        if (!request->kept) tpr_agent_on((tprpc_agent *)handle.owner, loop)->async_now++;
        request->kept = true;
    }
    tpr_agent_request_exit(loop);
    return status;
}

TPRPC_API bool tprpc_request_cancelled(tprpc_request handle) {
    tpr_loop *loop;
    tpr_agent_request *request = tpr_agent_request_enter(handle, &loop);
    bool cancelled = !request || request->cancelled;
    tpr_agent_request_exit(loop);
    return cancelled;
}

TPRPC_API const char *tprpc_request_caller(tprpc_request handle) {
    tpr_loop *loop;
    tpr_agent_request *request = tpr_agent_request_enter(handle, &loop);
    const char *caller = request ? request->server->caller : NULL;
    tpr_agent_request_exit(loop);
    return caller;
}

TPRPC_API const tprpc_message *tprpc_request_message(tprpc_request handle) {
    tpr_loop *loop;
    tpr_agent_request *request = tpr_agent_request_enter(handle, &loop);
    const tprpc_message *message = request && request->whole ? &request->in->message : NULL;
    tpr_agent_request_exit(loop);
    return message;
}

TPRPC_API void *tprpc_request_stream(tprpc_request handle, tprpc_device device) {
    tpr_loop *loop = tpr_agent_loop_of(handle.owner, handle.id);
    const tpr_context_backend *entry = loop ? tpr_pipe_converter(loop->context, device.kind) : NULL;
    if (!entry || !entry->backend->converter->stream) return NULL;
    if (tpr_agent_check_device(loop->context, device, "", 0, NULL) != TPRPC_OK) return NULL;
    tpr_loop_enter(loop);
    bool stale = !tpr_agent_request_of((tprpc_agent *)handle.owner, loop, handle.id);
    tpr_loop_leave(loop);
    if (stale) return NULL;
    return entry->backend->converter->stream(entry->backend->user, loop->context, device);
}

// >>group -------------------------------------------------------------------------------------------------------------
// Membership: how an agent joins its group through the store, leaves it, and goes.
//
// Uses: atomic, os, base, wire, timer, loop, context, transport, pipe, store, agent.
// Invariant: an agent's state is written here alone, under the first loop's lock. What is asked of the store is counted
// in `start_pending`, and its end is awaited before the agent goes.

// ---- start

TPR_COLD static void tpr_group_ready_run(tpr_loop_task *task) {
    tprpc_agent *agent = TPR_CONTAINER(task, tprpc_agent, ready_task);
    bool good = agent->ready_error.status == TPRPC_OK;
    if (agent->on_ready)
        agent->on_ready(agent->ready_error.status, NULL, good ? NULL : &agent->ready_error, agent->ready_user);
}

TPR_COLD static void tpr_group_ready_over(tpr_loop_task *task) {
    tprpc_agent *agent = TPR_CONTAINER(task, tprpc_agent, ready_task);
    tpr_agent_on(agent, tpr_agent_home(agent))->sends--;
}

static void tpr_group_set_state(tprpc_agent *agent, tpr_agent_state state) {
    TPR_ATOMIC_STORE((uint32_t *)(void *)&agent->state, (uint32_t)state);
}

// The start has ended, well or not; under the first loop's lock.
static void tpr_group_started(tprpc_agent *agent) {
    tpr_loop *home = tpr_agent_home(agent);
    if (agent->starting_done) return;
    agent->starting_done = true;
    tpr_timer_cancel(&home->wheel, &agent->start_timer);
    agent->ready_error = agent->start_error;
    if (agent->state == TPR_AGENT_STARTING)
        tpr_group_set_state(agent, agent->start_error.status == TPRPC_OK ? TPR_AGENT_READY : TPR_AGENT_FAILED);
    agent->ready_task.run = tpr_group_ready_run;
    agent->ready_task.done = tpr_group_ready_over;
    tpr_agent_on(agent, home)->sends++;
    tpr_loop_post(home, &agent->ready_task);
    tpr_loop_notify(home);
    tpr_agent_held_go_all(agent);
}

TPR_COLD static void tpr_group_start_failed(tprpc_agent *agent, tprpc_status status, const char *text) {
    if (agent->start_error.status == TPRPC_OK)
        tprpc_error_set(&agent->start_error, status, 0, "%s cannot join: %.200s", agent->name, text);
}

// Begins one operation of the group's at the store. False: refused, and the start has failed.
static bool tpr_group_ask(tprpc_agent *agent, int32_t kind, const char *key, const void *value, size_t size,
                          int64_t deadline_us, void (*done)(tprpc_store_op *, void *), tpr_agent_start *slot) {
    tprpc_store_request request;
    tprpc_error error = TPR_ZERO;
    memset(&request, 0, sizeof request);
    request.size = (uint32_t)sizeof request;
    request.kind = kind;
    request.key = key;
    request.value = value;
    request.value_size = size;
    request.deadline_us = deadline_us;
    agent->start_pending++;
    if (tpr_store_submit(agent->store, agent->ctx, 0, &request, done, slot, &slot->op, &error) == TPRPC_OK) return true;
    agent->start_pending--;
    slot->op = NULL;
    tpr_group_start_failed(agent, error.status, error.text);
    return false;
}

static void tpr_group_start_check(tprpc_agent *agent) {
    if (!agent->start_pending) tpr_group_started(agent);
}

// Another rank's word has come, or not.
static void tpr_group_start_peer(tprpc_store_op *op, void *arg) {
    tpr_agent_start *slot = (tpr_agent_start *)arg;
    tprpc_agent *agent = slot->agent;
    tpr_wire_worker *where = (tpr_wire_worker *)tpr_agent_alloc(agent, sizeof *where);
    char text[160];
    slot->op = NULL;
    agent->start_pending--;
    if (op->status == TPRPC_ERROR_TIMEOUT) {
        snprintf(text, sizeof text, "rank %u of %u did not come", (unsigned)slot->rank, (unsigned)agent->world_size);
        tpr_group_start_failed(agent, TPRPC_ERROR_TIMEOUT, text);
    } else if (op->status != TPRPC_OK) {
        tpr_group_start_failed(agent, op->status, op->error.text);
    } else if (!where || !tpr_wire_get_worker(op->value, op->value_size, where)) {
        tpr_group_start_failed(agent, where ? TPRPC_ERROR_PROTOCOL : TPRPC_ERROR_MEMORY,
                               "a worker's entry in the store cannot be read");
    } else {
        tpr_agent_worker *worker = tpr_agent_worker_of(agent, where->name, true);
        if (worker && !worker->where) {
            worker->where = where;
            worker->rank = where->rank;
            worker->known = true;
            where = NULL;
        }
        if (!worker) tpr_group_start_failed(agent, TPRPC_ERROR_MEMORY, "no memory for a worker");
    }
    tpr_agent_free(agent, where, sizeof *where);
    tpr_group_start_check(agent);
}

// The claim of a key has come back with what it holds now: ours, or another's.
static bool tpr_group_claimed(tprpc_agent *agent, tprpc_store_op *op, const char *what) {
    tpr_wire_worker *holder = (tpr_wire_worker *)tpr_agent_alloc(agent, sizeof *holder);
    char text[200] = "";
    if (op->status != TPRPC_OK) tpr_group_start_failed(agent, op->status, op->error.text);
    else if (!holder || !tpr_wire_get_worker(op->value, op->value_size, holder))
        tpr_group_start_failed(agent, TPRPC_ERROR_PROTOCOL, "its own entry in the store cannot be read");
    else if (holder->nonce != agent->nonce) {
        snprintf(text, sizeof text, "%s is taken by worker %.40s; if that is dead, delete the key %.80s of the store",
                 what, holder->name, op->request.key);
        tpr_group_start_failed(agent, TPRPC_ERROR_INVALID, text);
    }
    tpr_agent_free(agent, holder, sizeof *holder);
    return agent->start_error.status == TPRPC_OK;
}

// The start's time is over, whatever the store's is: what is still asked ends. Again a second later, for what was asked
// of a store whose answer was on its way.
TPR_COLD static void tpr_group_start_late(tprpc_work *work) {
    tprpc_agent *agent = TPR_CONTAINER(work, tprpc_agent, start_timer);
    for (uint32_t r = 0; r < (agent->is_static ? agent->world_size : 1); r++)
        if (agent->starts[r].op) tpr_store_cancel_for(agent->store, agent->starts[r].op, TPRPC_ERROR_TIMEOUT);
    tpr_loop_timer(tpr_agent_home(agent), work, tpr_loop_clock(tpr_agent_home(agent)) + 1000000);
}

static int64_t tpr_group_start_deadline(tprpc_agent *agent) {
    int64_t deadline = tpr_context_deadline(tprpc_now_us(agent->ctx), agent->start_timeout_ms);
    return deadline == INT64_MAX ? TPRPC_FOREVER : deadline;
}

static void tpr_group_start_ranked(tprpc_store_op *op, void *arg) {
    tpr_agent_start *slot = (tpr_agent_start *)arg;
    tprpc_agent *agent = slot->agent;
    char what[64], key[64];
    slot->op = NULL;
    agent->start_pending--;
    snprintf(what, sizeof what, "rank %u", (unsigned)agent->rank);
    if (tpr_group_claimed(agent, op, what)) {
        int64_t deadline = tpr_group_start_deadline(agent);
        agent->gathering = true;
        for (uint32_t r = 0; r < agent->world_size; r++) {
            snprintf(key, sizeof key, "tprpc/rank/%u", (unsigned)r);
            if (!tpr_group_ask(agent, TPRPC_STORE_GET, key, NULL, 0, deadline, tpr_group_start_peer, &agent->starts[r]))
                break;
        }
    }
    tpr_group_start_check(agent);
}

// The name first, then the rank: others go on once all ranks are there, so by then nothing more can be refused.
static void tpr_group_start_named(tprpc_store_op *op, void *arg) {
    tpr_agent_start *slot = (tpr_agent_start *)arg;
    tprpc_agent *agent = slot->agent;
    uint8_t value[1400];
    char key[64];
    slot->op = NULL;
    agent->start_pending--;
    if (tpr_group_claimed(agent, op, "the name") && agent->is_static) {
        snprintf(key, sizeof key, "tprpc/rank/%u", (unsigned)agent->rank);
        tpr_group_ask(agent, TPRPC_STORE_COMPARE_SET, key, value,
                      tpr_wire_put_worker(value, sizeof value, &agent->self), 0, tpr_group_start_ranked, slot);
    }
    tpr_group_start_check(agent);
}

// ---- where this worker listens

// The host part of "tcp://host:port" or "[v6]:port". False: the url has none.
static bool tpr_group_url_host(const char *url, char *host, size_t size) {
    const char *at = url ? strstr(url, "://") : NULL;
    const char *end = at ? strrchr(at, ':') : NULL;
    if (!at || end <= at + 2 || tpr_base_starts_with(url, "file://") || tpr_base_starts_with(url, "local://"))
        return false;
    at += 3;
    if (*at == '[') at++;
    if (end > at && end[-1] == ']') end--;
    if (end <= at || (size_t)(end - at) >= size) return false;
    memcpy(host, at, (size_t)(end - at));
    host[end - at] = 0;
    return true;
}

// The address to bind and publish, as text: the one named, what routes to the store, or loopback where the store has
// no host; but an insecure group may be on several, and loopback would be a wrong answer there. Blocks for names.
TPR_COLD
static tprpc_status tpr_group_find_host(tprpc_agent *agent, const char *store_url, char *out, size_t size,
                                        tprpc_error *error) {
    tpr_os_address address, store;
    char host[TPR_AGENT_TEXT];
    const char *why = NULL;
    memset(&address, 0, sizeof address);
    if (agent->address[0]) {
        bool none = tpr_os_interface(agent->address, &address) != 0;
        if (none && errno != ENODEV)
            return tpr_base_os_error(error, errno, "looking for the interface", agent->address);
        if (none) why = tpr_os_resolve(agent->address, 0, &address);
        if (why)
            return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                                   "address \"%.80s\" is neither an interface nor an address: %s", agent->address, why);
    } else if (tpr_group_url_host(store_url, host, sizeof host)) {
        why = tpr_os_resolve(host, 1, &store);
        if (why) return tprpc_error_set(error, TPRPC_ERROR_UNREACHABLE, 0, "the store's host %.80s: %s", host, why);
        if (tpr_os_route(&store, &address) != 0) return tpr_base_os_error(error, errno, "finding a route to", host);
    } else if (agent->insecure &&
               (tpr_base_starts_with(store_url, "file://") || (agent->store && agent->store->table))) {
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "worker %s is `insecure`, and its store %.80s has no host that tells which interface "
                               "to publish: give `address`, an interface or address", agent->name, store_url);
    } else {
        why = tpr_os_resolve("127.0.0.1", 0, &address);
        if (why) return tprpc_error_set(error, TPRPC_ERROR_SYSTEM, 0, "127.0.0.1: %s", why);
    }
    tpr_os_address_text(&address, false, out, size);
    if (!tpr_os_is_loopback(&address) && !agent->insecure)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                               "worker %s would be reachable at %s: beyond loopback a group needs "
                               "a `secret` (which needs TLS, not in this build) or `insecure`",
                               agent->name, out);
    return TPRPC_OK;
}

static tprpc_status tpr_group_listen(tprpc_agent *agent, const char *host, tprpc_error *error) {
    tprpc_context *ctx = agent->ctx;
    char texts[TPR_WIRE_ADDRESSES][160];
    const char *addresses[TPR_WIRE_ADDRESSES];
    tprpc_listener_desc desc = TPR_ZERO;
    for (uint32_t i = 0; i < ctx->backend_count && desc.address_count < TPR_WIRE_ADDRESSES; i++) {
        const tpr_context_backend *entry = &ctx->backends[i];
        char *text = texts[desc.address_count];
        if (!entry->viable || !entry->backend->transport) continue;
        if (!(entry->backend->transport->flags & TPRPC_TRANSPORT_HOST_PORT))
            snprintf(text, 160, "%s://", entry->backend->name);
        else snprintf(text, 160, strchr(host, ':') ? "%s://[%s]:0" : "%s://%s:0", entry->backend->name, host);
        addresses[desc.address_count++] = text;
    }
    desc.addresses = addresses;
    desc.insecure = agent->insecure;
    tprpc_status status =
        tpr_pipe_listen_for(ctx, &desc, tpr_agent_home(agent), tpr_agent_serve, agent, &agent->listener, error);
    if (status != TPRPC_OK) return status;
    snprintf(agent->self.name, sizeof agent->self.name, "%s", agent->name);
    agent->self.nonce = agent->nonce;
    agent->self.rank = agent->rank;
    agent->self.space = agent->ctx->process_space;
    agent->self.process = (uint32_t)tpr_os_pid();
    for (uint32_t i = 0; i < agent->listener->count && agent->self.address_count < TPR_WIRE_ADDRESSES; i++) {
        if (!agent->listener->addresses[i].given) continue;
        snprintf(agent->self.addresses[agent->self.address_count++], TPR_WIRE_ADDRESS, "%s",
                 agent->listener->addresses[i].address);
    }
    return TPRPC_OK;
}

// What a start does before it waits: environment, store, address, listener. May block for names; no lock is held.
static tprpc_status tpr_group_prepare(tprpc_agent *agent, tprpc_error *error) {
    char url[TPR_AGENT_TEXT], host[80];
    tprpc_status status = TPRPC_OK;
    snprintf(url, sizeof url, "%s", agent->store ? agent->store->name : agent->init_method);
    if (!agent->store && strcmp(url, "env://") == 0) {
        int32_t rank = 0, world = 0;
        status = tpr_store_env(&rank, &world, url, sizeof url, error);
        if (status != TPRPC_OK) return status;
        if (!agent->is_static) {
            agent->rank = (uint32_t)rank;
            agent->world_size = (uint32_t)world;
            agent->is_static = true;
        }
    }
    uint32_t slots = agent->is_static ? agent->world_size : 1;
    agent->starts = (tpr_agent_start *)tpr_agent_alloc(agent, slots * sizeof *agent->starts);
    if (!agent->starts)
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a group of %u", (unsigned)slots);
    for (uint32_t i = 0; i < slots; i++) {
        agent->starts[i].agent = agent;
        agent->starts[i].rank = i;
    }
    status = tpr_group_find_host(agent, url, host, sizeof host, error);
    if (status == TPRPC_OK) status = tpr_group_listen(agent, host, error);
    if (status != TPRPC_OK || agent->store) return status;
    tprpc_store_desc desc = TPR_ZERO;
    desc.url = url;
    desc.serve = agent->is_static ? agent->rank == 0 : agent->serve_store;
    desc.insecure = agent->insecure;
    desc.timeout_ms = agent->start_timeout_ms;
    status = tprpc_store_open(agent->ctx, &desc, &agent->store, error);
    if (status != TPRPC_OK && strcmp(agent->init_method, "env://") == 0) tpr_store_env_taken(error);
    agent->own_store = status == TPRPC_OK;
    return status;
}

// Begins the start. On an error, which is put down in *error too, it is over.
static tprpc_status tpr_group_begin(tprpc_agent *agent, tprpc_done on_ready, void *user, tprpc_error *error) {
    tpr_loop *home = tpr_agent_home(agent);
    uint8_t value[1400];
    char key[TPR_AGENT_NAME + 16];
    tpr_loop_enter(home);
    bool fresh = agent->state == TPR_AGENT_NEW;
    if (fresh) tpr_group_set_state(agent, TPR_AGENT_STARTING);
    tpr_loop_leave(home);
    if (!fresh) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "worker %s was started before", agent->name);
    tprpc_status status = tpr_group_prepare(agent, error);
    tpr_loop_enter(home);
    if (status == TPRPC_OK) {
        agent->on_ready = on_ready;
        agent->ready_user = user;
        agent->start_pending = 1;
        snprintf(key, sizeof key, "tprpc/name/%s", agent->name);
        tpr_group_ask(agent, TPRPC_STORE_COMPARE_SET, key, value,
                      tpr_wire_put_worker(value, sizeof value, &agent->self), 0, tpr_group_start_named,
                      &agent->starts[0]);
        agent->start_pending--;
        int64_t due = tpr_group_start_deadline(agent);
        agent->start_timer.run = tpr_group_start_late;
        if (due != TPRPC_FOREVER) tpr_loop_timer(home, &agent->start_timer, due);
        tpr_group_start_check(agent);
    } else {
        tpr_group_set_state(agent, TPR_AGENT_FAILED);
        agent->ready_error = *error;   // for those who wait; on_ready does not run, the status is returned
        agent->starting_done = true;
        tpr_loop_notify(home);
        tpr_agent_held_go_all(agent);
    }
    tpr_loop_leave(home);
    return status;
}

// ---- leaving

static bool tpr_group_no_calls(void *arg) { return ((tpr_agent_loop *)arg)->active == 0; }
static bool tpr_group_step_over(void *arg) { return ((tprpc_agent *)arg)->start_pending == 0; }
TPR_COLD static bool tpr_group_start_over(void *arg) { return ((tprpc_agent *)arg)->starting_done; }

TPR_COLD static void tpr_group_left_peer(tprpc_store_op *op, void *arg) {
    tpr_agent_start *slot = (tpr_agent_start *)arg;
    tprpc_agent *agent = slot->agent;
    char text[160];
    slot->op = NULL;
    agent->start_pending--;
    if (op->status == TPRPC_ERROR_TIMEOUT && slot->rank != agent->rank) {   // its own word: the store says why
        const char *name = "";
        for (uint32_t i = 0; i < tpr_agent_workers(agent); i++)
            if (tpr_agent_worker_at(agent, i)->rank == slot->rank) name = tpr_agent_worker_at(agent, i)->name;
        snprintf(text, sizeof text, "worker %.100s (rank %u) has not left", name, (unsigned)slot->rank);
        if (agent->start_error.status == TPRPC_OK)
            tprpc_error_set(&agent->start_error, TPRPC_ERROR_TIMEOUT, 0, "%s", text);
    } else if (op->status != TPRPC_OK && agent->start_error.status == TPRPC_OK) {
        agent->start_error = op->error;
        agent->start_error.status = op->status;
    }
    if (!agent->start_pending) tpr_loop_notify(tpr_agent_home(agent));
}

// One step that all take: says `what` for this rank, and with `wait` waits until all ranks have.
static tprpc_status tpr_group_all(tprpc_agent *agent, const char *what, bool wait, int64_t deadline,
                                  tprpc_error *error) {
    tpr_loop *home = tpr_agent_home(agent);
    char key[64];
    tpr_loop_enter(home);
    memset(&agent->start_error, 0, sizeof agent->start_error);
    agent->start_pending = 0;
    snprintf(key, sizeof key, "tprpc/%s/%u", what, (unsigned)agent->rank);
    bool good = tpr_group_ask(agent, TPRPC_STORE_SET, key, "1", 1, 0, tpr_group_left_peer, &agent->starts[agent->rank]);
    if (good) tpr_loop_wait(home, tpr_group_step_over, agent, deadline);
    for (uint32_t r = 0; good && wait && r < agent->world_size && agent->start_error.status == TPRPC_OK; r++) {
        if (r == agent->rank) continue;
        snprintf(key, sizeof key, "tprpc/%s/%u", what, (unsigned)r);
        good = tpr_group_ask(agent, TPRPC_STORE_GET, key, NULL, 0, deadline == INT64_MAX ? TPRPC_FOREVER : deadline,
                             tpr_group_left_peer, &agent->starts[r]);
    }
    bool over = tpr_loop_wait(home, tpr_group_step_over, agent, deadline == INT64_MAX ? deadline : deadline + 1000000);
    if (!over) {
        tprpc_error_set(&agent->start_error, TPRPC_ERROR_TIMEOUT, 0, "the store does not answer");
        for (uint32_t r = 0; r < agent->world_size; r++)
            if (agent->starts[r].op) tpr_store_cancel(agent->store, agent->starts[r].op);
        tpr_loop_wait(home, tpr_group_step_over, agent, tpr_loop_clock(home) + 1000000);
    }
    if (agent->start_error.status != TPRPC_OK && error) *error = agent->start_error;
    tprpc_status status = agent->start_error.status;
    tpr_loop_leave(home);
    return status;
}

// Waits until no call of this worker's own is running.
static tprpc_status tpr_group_drain_calls(tprpc_agent *agent, int64_t deadline, tprpc_error *error) {
    for (uint32_t i = 0; i < agent->ctx->loop_count; i++) {
        tpr_loop *loop = &agent->ctx->loops[i];
        tpr_loop_enter(loop);
        tpr_agent_on(agent, loop)->drained = true;
        bool none = tpr_loop_wait(loop, tpr_group_no_calls, tpr_agent_on(agent, loop), deadline);
        tpr_loop_leave(loop);
        if (!none) return tprpc_error_set(error, TPRPC_ERROR_TIMEOUT, 0, "calls of %s are still running", agent->name);
    }
    return TPRPC_OK;
}

// ---- the end

// Ends what the agent waits for of its store, and lets nothing begin any more. Under the first loop's lock.
static void tpr_group_close(tprpc_agent *agent) {
    if (agent->state == TPR_AGENT_STARTING) tpr_group_start_failed(agent, TPRPC_ERROR_CLOSED, "it was destroyed");
    tpr_group_set_state(agent, TPR_AGENT_LEFT);
    TPR_ATOMIC_STORE(&agent->closing, 1u);
    for (uint32_t r = 0; agent->starts && r < (agent->is_static ? agent->world_size : 1); r++)
        if (agent->starts[r].op) tpr_store_cancel(agent->store, agent->starts[r].op);
}

// ---- public

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_start(tprpc_agent *agent, tprpc_done on_ready, void *user, tprpc_error *error) {
    TPRPC_ASSERT(agent);
    if (!agent || !tpr_context_usable(agent->ctx))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "tprpc_agent_start: no agent, or one inherited by a fork");
    tprpc_error mine = TPR_ZERO;
    tprpc_status status = tpr_group_begin(agent, on_ready, user, &mine);
    if (status != TPRPC_OK && error) *error = mine;
    return status;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_wait_ready(tprpc_agent *agent, int64_t timeout_ms, tprpc_error *error) {
    TPRPC_ASSERT(agent);
    if (!agent || !tpr_context_usable(agent->ctx))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "tprpc_agent_wait_ready: no agent, or one inherited by a fork");
    tpr_loop *home = tpr_agent_home(agent);
    tprpc_status status = TPRPC_OK;
    tpr_loop_enter(home);
    bool fresh = agent->state == TPR_AGENT_NEW;
    tpr_loop_leave(home);
    if (fresh) status = tprpc_agent_start(agent, NULL, NULL, error);
    if (status != TPRPC_OK) return status;
    tpr_loop_enter(home);
    int64_t most_ms = tpr_context_time(timeout_ms, agent->start_timeout_ms);
    int64_t deadline = tpr_context_deadline(tpr_loop_clock(home), most_ms);
    if (timeout_ms == 0 && deadline != INT64_MAX) deadline += 1000000;   // the start itself says who is missing
    bool over = tpr_loop_wait(home, tpr_group_start_over, agent, deadline);
    status = over ? agent->ready_error.status : TPRPC_ERROR_TIMEOUT;
    if (over && status != TPRPC_OK && error) *error = agent->ready_error;
    if (!over) {
        uint32_t missing = 0;
        while (missing + 1 < agent->world_size && !(agent->starts && agent->starts[missing].op)) missing++;
        tprpc_error_set(error, status, 0,
                        agent->gathering ? "%s waited %lld ms for its group; rank %u has not come"
                        : "%s waited %lld ms for its store", agent->name, (long long)most_ms, (unsigned)missing);
    }
    tpr_loop_leave(home);
    return status;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_leave(tprpc_agent *agent, int64_t timeout_ms, tprpc_error *error) {
    TPRPC_ASSERT(agent);
    if (!agent || !tpr_context_usable(agent->ctx) || tpr_context_in_callback(agent->ctx))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "tprpc_agent_leave: no agent, one inherited by a fork, or in a callback");
    tpr_loop *home = tpr_agent_home(agent);
    tpr_loop_enter(home);
    bool ready = agent->state == TPR_AGENT_READY;
    if (ready) tpr_group_set_state(agent, TPR_AGENT_LEAVING);
    int64_t deadline =
        tpr_context_deadline(tpr_loop_clock(home), tpr_context_time(timeout_ms, agent->start_timeout_ms));
    tpr_loop_leave(home);
    if (!ready) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "worker %s is not in its group", agent->name);
    tprpc_status status = tpr_group_drain_calls(agent, deadline, error);
    if (status == TPRPC_OK && agent->is_static) status = tpr_group_all(agent, "leave", true, deadline, error);
    if (status == TPRPC_OK && agent->is_static)
        status = tpr_group_all(agent, "left", agent->rank == 0, deadline, error);
    if (!agent->is_static) {
        char key[TPR_AGENT_NAME + 16];
        tpr_loop_enter(home);
        memset(&agent->start_error, 0, sizeof agent->start_error);
        snprintf(key, sizeof key, "tprpc/name/%s", agent->name);
        if (tpr_group_ask(agent, TPRPC_STORE_DELETE, key, NULL, 0, 0, tpr_group_left_peer, &agent->starts[0]))
            tpr_loop_wait(home, tpr_group_step_over, agent, deadline);
        if (agent->start_pending)
            tprpc_error_set(&agent->start_error, TPRPC_ERROR_TIMEOUT, 0, "the store has not answered");
        if (status == TPRPC_OK && agent->start_error.status != TPRPC_OK)
            status = tprpc_error_set(error, agent->start_error.status, 0, "%s is still in the store: %.180s",
                                     agent->name, agent->start_error.text);
        tpr_loop_leave(home);
    }
    tpr_group_set_state(agent, TPR_AGENT_LEFT);
    return status;
}

TPR_COLD
TPRPC_API tprpc_status tprpc_agent_destroy(tprpc_agent *agent) {
    if (!agent) return TPRPC_OK;
    tprpc_context *ctx = agent->ctx;
    bool inside = false;
    if (!tpr_context_usable(ctx) || tpr_context_in_callback(ctx)) return TPRPC_ERROR_INVALID;
    tpr_agent_method_runs(agent, NULL, &inside);
    if (inside) return TPRPC_ERROR_INVALID;   // it would wait for the handler that it stands in
    tpr_loop *home = tpr_agent_home(agent);
    tpr_loop_enter(home);
    uintptr_t callback_thread = home->callback_thread;
    if (ctx->env.polled) home->callback_thread = tpr_os_thread_id();
    tpr_group_close(agent);
    tpr_loop_leave(home);
    if (agent->listener) tprpc_listener_close(agent->listener);
    agent->listener = NULL;            // it may be destroyed again
    for (uint32_t i = 0; i < ctx->loop_count; i++) {
        tpr_loop_enter(&ctx->loops[i]);
        tpr_agent_end_loop(agent, &ctx->loops[i]);
        tpr_loop_leave(&ctx->loops[i]);
    }
    bool idle = true;
    for (uint32_t i = 0; i < ctx->loop_count && idle; i++) {
        tpr_loop *loop = &ctx->loops[i];
        tpr_loop_enter(loop);
        if (i == 0) while (!tpr_loop_wait(loop, tpr_group_step_over, agent, tpr_loop_clock(loop) + 1000000)) { }
        idle = tpr_agent_wait_idle(agent, loop);
        tpr_loop_leave(loop);
    }
    if (idle) tpr_agent_stop_threads(agent);   // not before: what ran there may have waited for a callback of here
    tpr_loop_enter(home);
    if (ctx->env.polled) home->callback_thread = callback_thread;
    tpr_loop_leave(home);
    if (!idle) return TPRPC_ERROR_TIMEOUT;
    if (agent->own_store) tprpc_store_close(agent->store);
    tpr_agent_dispose(agent);
    return TPRPC_OK;
}

// >>report ------------------------------------------------------------------------------------------------------------
// What a person reads: which path each peer's bytes take, and why not another.
//
// Uses: atomic, os, base, timer, loop, context, pipe, agent.
// Invariant: nothing is kept here; a report is written from a copy of the figures, without a lock.

typedef struct tpr_report { char *out; size_t size, used; } tpr_report;   // used: what a whole report needs

__attribute__((format(printf, 2, 3)))
static void tpr_report_line(tpr_report *report, const char *format, ...) {
    va_list args;
    size_t left = report->used < report->size ? report->size - report->used : 0;
    va_start(args, format);
    int n = vsnprintf(left ? report->out + report->used : NULL, left, format, args);
    va_end(args);
    if (n > 0) report->used += (size_t)n;
}

static void tpr_report_info(tpr_report *report, const tprpc_pipe_info *info) {
    if (info->error.status != TPRPC_OK) tpr_report_line(report, "failed: %s; ", info->error.text);
    tpr_report_line(report, "%s%s%s, %s; sent %llu, received %llu bytes; of tensors %llu and %llu",
                    info->transport[0] ? info->transport : "not agreed", info->channel[0] ? " and " : "", info->channel,
                    info->peer[0] ? info->peer : "no peer", (unsigned long long)info->bytes_sent,
                    (unsigned long long)info->bytes_received, (unsigned long long)info->tensor_bytes_sent,
                    (unsigned long long)info->tensor_bytes_received);
    if (info->tensor_bytes_adopted)
        tpr_report_line(report, ", of which %llu not copied", (unsigned long long)info->tensor_bytes_adopted);
    tpr_report_line(report, "\n");
    for (uint32_t i = 0; i < info->path_count && i < TPR_COUNT(info->paths); i++) {
        const tprpc_path *path = &info->paths[i];
        if (!path->chosen || path->why[0])
            tpr_report_line(report, "    %s%s: %s\n", path->chosen ? "" : "not ", path->name, path->why);
    }
}

// ---- public

TPR_COLD
TPRPC_API size_t tprpc_pipe_report(const tprpc_pipe_info *info, char *out, size_t size) {
    tpr_report report = {out, size, 0};
    TPRPC_ASSERT(info && (out || !size));
    if (!out) report.size = 0;
    else if (size) out[0] = 0;
    if (info) tpr_report_info(&report, info);
    return report.used;
}

TPR_COLD
TPRPC_API size_t tprpc_agent_report(tprpc_agent *agent, char *out, size_t size) {
    tpr_report report = {out, size, 0};
    tprpc_stats stats;
    TPRPC_ASSERT(agent && (out || !size));
    if (!out) report.size = 0;
    else if (size) out[0] = 0;
    if (tprpc_agent_get_stats(agent, &stats, sizeof stats) != TPRPC_OK) return 0;
    tpr_report_line(&report, "%s: %llu calls (%llu active, %llu failed, %llu timed out), %llu requests (%llu active), "
                    "%llu bytes of memory\n", agent->name, (unsigned long long)stats.calls,
                    (unsigned long long)stats.client_active_calls, (unsigned long long)stats.calls_failed,
                    (unsigned long long)stats.calls_timed_out, (unsigned long long)stats.requests,
                    (unsigned long long)stats.server_active_calls, (unsigned long long)stats.memory_bytes);
    for (uint32_t i = 0; i < stats.workers; i++) {
        tprpc_pipe_info info;
        const char *name = tpr_agent_worker_at(agent, i)->name;
        if (tprpc_agent_get_peer_info(agent, name, &info, sizeof info) != TPRPC_OK) continue;
        tpr_report_line(&report, "  %s: ", name);
        tpr_report_info(&report, &info);
    }
    return report.used;
}

// >>dlpack ------------------------------------------------------------------------------------------------------------
// Tensors as other libraries know them, where the user has included dlpack.h (0.6 or newer) before.
//
// Uses: base.
// Invariant: what comes from DLPack is checked whole before anything of it is shown. A managed tensor is the caller's
// until a call has put its deleter into a message; from then on the message's release is the one place that runs it.

#if defined(DLPACK_VERSION) || defined(DLPACK_MAJOR_VERSION)
#if defined(DLPACK_VERSION) && DLPACK_VERSION < 60
#error "tprpc: this dlpack.h is older than 0.6: take a newer one, or include it after the implementation"
#endif

// Numbers of DLPack's ABI: they stay, while its names for them changed and old headers lack some.
enum { TPR_DLPACK_CPU = 1, TPR_DLPACK_CUDA = 2, TPR_DLPACK_CUDA_HOST = 3 };
enum { TPR_DLPACK_INT = 0, TPR_DLPACK_UINT = 1, TPR_DLPACK_FLOAT = 2, TPR_DLPACK_BFLOAT = 4, TPR_DLPACK_COMPLEX = 5,
       TPR_DLPACK_BOOL = 6 };
#if defined(DLPACK_VERSION) && DLPACK_VERSION < 80
enum { TPR_DLPACK_LAST_CODE = TPR_DLPACK_COMPLEX };   // what a reader built with this header may know
#else
enum { TPR_DLPACK_LAST_CODE = TPR_DLPACK_BOOL };
#endif

static const uint8_t tpr_dlpack_types[][2] = {   // code and bits of each tprpc_dtype
    {TPR_DLPACK_UINT, 8},   {TPR_DLPACK_BOOL, 8},
    {TPR_DLPACK_INT, 8},    {TPR_DLPACK_INT, 16},    {TPR_DLPACK_INT, 32},   {TPR_DLPACK_INT, 64},
    {TPR_DLPACK_UINT, 8},   {TPR_DLPACK_UINT, 16},   {TPR_DLPACK_UINT, 32},  {TPR_DLPACK_UINT, 64},
    {TPR_DLPACK_FLOAT, 16}, {TPR_DLPACK_BFLOAT, 16}, {TPR_DLPACK_FLOAT, 32}, {TPR_DLPACK_FLOAT, 64},
    {TPR_DLPACK_COMPLEX, 64}, {TPR_DLPACK_COMPLEX, 128}};

// Which tprpc_dtype it is; TPRPC_BYTES, which DLPack cannot say, when it is none.
static int32_t tpr_dlpack_dtype(DLDataType type) {
    for (int32_t i = TPRPC_BOOL; i < (int32_t)TPR_COUNT(tpr_dlpack_types); i++)
        if (tpr_dlpack_types[i][0] == type.code && tpr_dlpack_types[i][1] == type.bits) return i;
    return TPRPC_BYTES;
}

// The bytes of a tensor of whole-byte elements, if it is contiguous. Dimensions of size 1 may have any stride, and an
// empty tensor may have any at all.
static tprpc_status tpr_dlpack_bytes(const DLTensor *tensor, uint64_t *bytes, tprpc_error *error) {
    int64_t elements = 1, most = INT64_MAX / (tensor->dtype.bits / 8);
    if (tensor->ndim < 0 || (tensor->ndim > 0 && !tensor->shape))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "dlpack: %d dimensions and no shape", (int)tensor->ndim);
    for (int32_t i = 0; i < tensor->ndim; i++) if (tensor->shape[i] == 0) elements = 0;
    for (int32_t i = tensor->ndim; i-- > 0;) {
        int64_t n = tensor->shape[i];
        if (n < 0 || (n > 0 && elements > most / n))
            return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "dlpack: dimension %d cannot be %lld", (int)i,
                                   (long long)n);
        if (tensor->strides && elements > 0 && n > 1 && tensor->strides[i] != elements)
            return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "dlpack: the tensor is strided: dimension %d has "
                                   "stride %lld, contiguous is %lld", (int)i, (long long)tensor->strides[i],
                                   (long long)elements);
        elements *= n;
    }
    *bytes = (uint64_t)elements * (tensor->dtype.bits / 8u);
    return TPRPC_OK;
}

// Whether a tensor is one that tprpc can show at all.
static tprpc_status tpr_dlpack_check(const DLTensor *tensor, tprpc_error *error) {
    DLDataType type = tensor->dtype;
    int device = (int)tensor->device.device_type;
    if (type.lanes != 1)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "dlpack: elements of %u lanes", (unsigned)type.lanes);
    if (type.bits % 8 != 0 || type.bits == 0)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "dlpack: elements of %u bits, no whole bytes",
                               (unsigned)type.bits);
    if (tpr_dlpack_dtype(type) == TPRPC_BYTES)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "dlpack: elements of type code %u with %u bits",
                               (unsigned)type.code, (unsigned)type.bits);
    if (tensor->ndim > TPRPC_MAX_DIMS)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "dlpack: %d dimensions, at most %d",
                               (int)tensor->ndim, TPRPC_MAX_DIMS);
    if (device != TPR_DLPACK_CPU && device != TPR_DLPACK_CUDA && device != TPR_DLPACK_CUDA_HOST)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "dlpack: memory of device type %d", device);
    return TPRPC_OK;
}

static void tpr_dlpack_release(void *user) {
    DLManagedTensor *managed = (DLManagedTensor *)user;
    if (managed->deleter) managed->deleter(managed);
}

// ---- public

TPRPC_API tprpc_status tprpc_from_dlpack(DLManagedTensor *managed, tprpc_tensor *out, tprpc_message *message,
                                         tprpc_error *error) {
    uint64_t bytes = 0;
    TPRPC_ASSERT(managed && out);
    if (!managed || !out) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "dlpack: no tensor was given");
    if (message && message->release)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "dlpack: the message has a release, and would lose it");
    const DLTensor *tensor = &managed->dl_tensor;
    tprpc_status status = tpr_dlpack_check(tensor, error);
    if (status == TPRPC_OK) status = tpr_dlpack_bytes(tensor, &bytes, error);
    if (status != TPRPC_OK) return status;
    if (bytes > SIZE_MAX || (bytes && !tensor->data))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "dlpack: %llu bytes at %p", (unsigned long long)bytes,
                               tensor->data);
    memset(out, 0, sizeof *out);
    out->data = tensor->data ? (uint8_t *)tensor->data + tensor->byte_offset : NULL;
    out->size = (size_t)bytes;
    out->device.kind = (int)tensor->device.device_type == TPR_DLPACK_CUDA ? TPRPC_CUDA : TPRPC_CPU;
    out->device.index = out->device.kind == TPRPC_CUDA ? tensor->device.device_id : 0;
    out->dtype = tpr_dlpack_dtype(tensor->dtype);
    out->ndim = tensor->ndim;
    for (int32_t i = 0; i < tensor->ndim; i++) out->shape[i] = tensor->shape[i];
    if (message) {
        message->release = tpr_dlpack_release;
        message->release_user = managed;
    }
    return TPRPC_OK;
}

TPRPC_API tprpc_status tprpc_to_dlpack(const tprpc_tensor *tensor, DLTensor *out, int64_t *shape, tprpc_error *error) {
    DLTensor to;
    uint64_t bytes = 0;
    bool strided = false;
    TPRPC_ASSERT(tensor && out && shape);
    if (!tensor || !out || !shape || tensor->ndim < 0 || tensor->ndim > TPRPC_MAX_DIMS || tensor->dtype < 0 ||
        tensor->dtype >= (int32_t)TPR_COUNT(tpr_dlpack_types))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "dlpack: a tensor that is none");
    int32_t kind = tensor->device.kind;
    if (kind != TPRPC_DEVICE_DEFAULT && kind != TPRPC_CPU && kind != TPRPC_CUDA)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "dlpack: memory of device kind %d", (int)kind);
    memset(&to, 0, sizeof to);
    to.data = tensor->data;
    to.device.device_type = (DLDeviceType)(kind == TPRPC_CUDA ? TPR_DLPACK_CUDA : TPR_DLPACK_CPU);
    to.device.device_id = kind == TPRPC_CUDA ? tensor->device.index : 0;
    to.dtype.code = tpr_dlpack_types[tensor->dtype][0];
    to.dtype.bits = tpr_dlpack_types[tensor->dtype][1];
    to.dtype.lanes = 1;
    to.ndim = tensor->ndim;
    to.shape = shape;
    for (int32_t i = 0; i < tensor->ndim; i++) {
        shape[i] = tensor->shape[i];
        strided = strided || tensor->strides[i] != 0;
    }
    if (tensor->dtype == TPRPC_BYTES && tensor->ndim == 0) {   // raw bytes: a vector of them
        to.ndim = 1;
        shape[0] = (int64_t)tensor->size;
    }
    if (to.dtype.code > TPR_DLPACK_LAST_CODE)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "dlpack: this dlpack.h has no type code %u",
                               (unsigned)to.dtype.code);
    if (strided) to.strides = (int64_t *)(uintptr_t)tensor->strides;
    tprpc_status status = tpr_dlpack_bytes(&to, &bytes, error);
    if (status != TPRPC_OK) return status;
    if (bytes != tensor->size)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "dlpack: size is %zu, shape and dtype make %llu",
                               tensor->size, (unsigned long long)bytes);
    to.strides = NULL;
    *out = to;
    return TPRPC_OK;
}
#endif

#ifndef TPRPC_TEST_HOOKS   // the tests of internals go on with these
#undef TPR_ATOMIC_ADD
#undef TPR_ATOMIC_CAS
#undef TPR_ATOMIC_LOAD
#undef TPR_ATOMIC_LOAD_FULL
#undef TPR_ATOMIC_PEEK
#undef TPR_ATOMIC_POKE
#undef TPR_ATOMIC_STORE
#undef TPR_ATOMIC_STORE_FULL
#undef TPR_ATOMIC_SUB
#undef TPR_ATOMIC_SWAP
#undef TPR_CONTAINER
#undef TPR_COUNT
#undef TPR_LIKELY
#undef TPR_LOG
#undef TPR_OS_HOOKED
#undef TPR_OS_NO_SIZE
#undef TPR_TAG
#undef TPR_UNLIKELY
#undef TPR_UNUSED
#undef TPR_COLD
#undef TPR_APART
#undef TPR_ZERO
#endif

#ifdef __cplusplus
}
#endif

#if defined(__GNUC__) && defined(__cplusplus)
#pragma GCC diagnostic pop
#endif

#endif // the system's headers were right
#endif // TPRPC_IMPLEMENTATION

// This software is available under two licenses; choose whichever you prefer.
//
// ------------------------------------------------------------------------------
// ALTERNATIVE A - MIT No Attribution (MIT-0)
//
// Copyright (c) the tprpc authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of
// this software and associated documentation files (the "Software"), to deal in
// the Software without restriction, including without limitation the rights to
// use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
// of the Software, and to permit persons to whom the Software is furnished to do
// so.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
// IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
// FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
// AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
// LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
// OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
// SOFTWARE.
//
// ------------------------------------------------------------------------------
// ALTERNATIVE B - Public Domain (The Unlicense, unlicense.org)
//
// This is free and unencumbered software released into the public domain.
//
// Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
// software, either in source code form or as a compiled binary, for any purpose,
// commercial or non-commercial, and by any means.
//
// In jurisdictions that recognize copyright laws, the author or authors of this
// software dedicate any and all copyright interest in the software to the public
// domain. We make this dedication for the benefit of the public at large and to
// the detriment of our heirs and successors. We intend this dedication to be an
// overt act of relinquishment in perpetuity of all present and future rights to
// this software under copyright law.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
// IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
// FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
// AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
// ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
// WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
