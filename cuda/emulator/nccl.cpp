// A stand-in for NCCL among the threads of one process, on the emulated driver's memory. It is about right and wrong, and
// says nothing about speed.
//
// An operation is done when its call returns: a call blocks its thread until all ranks that it takes have made theirs, or
// until the communicator is aborted. Operations of a group are begun together. Sums are taken in rank order.
//
// Limits: communicators of one process, each rank a thread; nothing on a stream that is being captured.
//
// emulator_nccl_stall(n) makes the next n operations (or groups) of the calling thread be forgotten: they succeed at once
// and take no part, as if the device never came to them.

#include <cuda.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Result { kSuccess = 0, kInvalidArgument = 4, kInvalidUsage = 5, kRemoteError = 6 };
enum Type { kInt8, kUint8, kInt32, kUint32, kInt64, kUint64, kFloat16, kFloat32, kFloat64, kBfloat16 };
enum class Kind { kAllGather, kBroadcast, kAllReduce, kReduce, kReduceScatter, kSend, kReceive };

struct UniqueId {
    char internal[128];
};

struct Part {
    const void* send;
    void* receive;
};

// What the ranks brought to one collective.
struct Meeting {
    std::vector<Part> parts;
    int arrived = 0;
    int done = 0;
};

struct Message {
    const void* bytes;
    size_t size;
    bool taken = false;
};

struct Group {
    int ranks = 0;
    int joined = 0;
    std::map<uint64_t, Meeting> meetings;                                        // by number
    std::map<std::pair<int, int>, std::deque<std::shared_ptr<Message>>> messages;  // by source and destination
};

std::mutex the_lock;  // over everything
std::condition_variable changed;
std::map<std::string, std::shared_ptr<Group>> groups;
uint64_t ids = 0;

}  // namespace

struct ncclComm {
    std::shared_ptr<Group> group;
    int rank;
    uint64_t collectives = 0;
    bool aborted = false;
};

namespace {

struct Operation {
    Kind kind;
    ncclComm* comm;
    const void* send;
    void* receive;
    size_t count;
    int type;
    int peer;  // or root
    uint64_t number = 0;
    std::shared_ptr<Message> message;
    bool contributed = false, done = false;
};

thread_local int depth = 0;
thread_local std::vector<Operation> pending;
thread_local int stalls = 0;
thread_local std::string last_words;

using Lock = std::unique_lock<std::mutex>;

Result refuse(Result result, const char* words) { return last_words = words, result; }

size_t size_of(int type) {
    switch (type) {
        case kInt8: case kUint8: return 1;
        case kFloat16: case kBfloat16: return 2;
        case kInt32: case kUint32: case kFloat32: return 4;
        default: return 8;
    }
}

float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    return memcpy(&value, &wide, 4), value;
}

uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T> T at(const void* values, size_t i) {
    T value;
    return memcpy(&value, static_cast<const char*>(values) + i * sizeof(T), sizeof(T)), value;
}
template <typename T> void put(void* values, size_t i, T value) {
    memcpy(static_cast<char*>(values) + i * sizeof(T), &value, sizeof(T));
}

// Sums of `count` elements that begin at element `first` of what each rank sends.
bool sum(const std::vector<Part>& parts, size_t first, size_t count, int type, void* out) {
    for (size_t i = 0; i < count; ++i) {
        const size_t from = first + i;
        if (type == kFloat32) {
            float total = at<float>(parts[0].send, from);
            for (size_t r = 1; r < parts.size(); ++r) total += at<float>(parts[r].send, from);
            put(out, i, total);
        } else if (type == kFloat64) {
            double total = at<double>(parts[0].send, from);
            for (size_t r = 1; r < parts.size(); ++r) total += at<double>(parts[r].send, from);
            put(out, i, total);
        } else if (type == kFloat16) {
            _Float16 total = at<_Float16>(parts[0].send, from);
            for (size_t r = 1; r < parts.size(); ++r) total = static_cast<_Float16>(total + at<_Float16>(parts[r].send, from));
            put(out, i, total);
        } else if (type == kBfloat16) {
            uint16_t total = at<uint16_t>(parts[0].send, from);
            for (size_t r = 1; r < parts.size(); ++r) {
                total = to_bfloat16(from_bfloat16(total) + from_bfloat16(at<uint16_t>(parts[r].send, from)));
            }
            put(out, i, total);
        } else {
            return false;
        }
    }
    return true;
}

void begin(Operation& op) {
    Group& group = *op.comm->group;
    if (op.kind == Kind::kSend) {
        op.message = std::make_shared<Message>(Message{op.send, op.count * size_of(op.type)});
        group.messages[{op.comm->rank, op.peer}].push_back(op.message);
    } else if (op.kind != Kind::kReceive) {
        op.number = op.comm->collectives++;
        Meeting& meeting = group.meetings[op.number];
        meeting.parts.resize(static_cast<size_t>(group.ranks));
        meeting.parts[static_cast<size_t>(op.comm->rank)] = {op.send, op.receive};
        ++meeting.arrived;
    }
}

// This rank's share of a collective to which all have come.
bool contribute(Operation& op, const Meeting& meeting) {
    const size_t bytes = op.count * size_of(op.type);
    const size_t rank = static_cast<size_t>(op.comm->rank), root = static_cast<size_t>(op.peer);
    switch (op.kind) {
        case Kind::kAllGather:
            for (size_t r = 0; r < meeting.parts.size(); ++r) {
                memcpy(static_cast<char*>(op.receive) + r * bytes, meeting.parts[r].send, bytes);
            }
            return true;
        case Kind::kBroadcast: return memcpy(op.receive, meeting.parts[root].send, bytes), true;
        case Kind::kAllReduce: return sum(meeting.parts, 0, op.count, op.type, op.receive);
        case Kind::kReduce: return rank != root || sum(meeting.parts, 0, op.count, op.type, op.receive);
        case Kind::kReduceScatter: return sum(meeting.parts, rank * op.count, op.count, op.type, op.receive);
        default: return false;
    }
}

// Carries the operation on as far as it can be; false where it cannot be right.
bool advance(Operation& op) {
    Group& group = *op.comm->group;
    if (op.kind == Kind::kSend) {
        op.done = op.message->taken;
    } else if (op.kind == Kind::kReceive) {
        auto& queue = group.messages[{op.peer, op.comm->rank}];
        if (queue.empty()) return true;
        if (queue.front()->size != op.count * size_of(op.type)) return false;
        memcpy(op.receive, queue.front()->bytes, queue.front()->size);
        queue.front()->taken = true;
        queue.pop_front();
        op.done = true;
        changed.notify_all();
    } else {
        Meeting& meeting = group.meetings[op.number];
        if (meeting.arrived < group.ranks) return true;
        if (!op.contributed) {
            op.contributed = true;
            ++meeting.done;
            changed.notify_all();
            if (!contribute(op, meeting)) return false;
        }
        // What this rank sends is read until all are done.
        op.done = meeting.done == group.ranks;
    }
    return true;
}

Result run(std::vector<Operation> operations) {
    if (operations.empty()) return kSuccess;
    if (stalls > 0) return --stalls, kSuccess;
    Lock lock(the_lock);
    for (Operation& op : operations) begin(op);
    changed.notify_all();
    for (;;) {
        bool done = true;
        for (Operation& op : operations) {
            if (op.comm->aborted) return refuse(kRemoteError, "the communicator was aborted");
            if (!op.done && !advance(op)) return refuse(kInvalidUsage, "the ranks do not fit together");
            done = done && op.done;
        }
        if (done) return kSuccess;
        changed.wait_for(lock, std::chrono::milliseconds(50));
    }
}

Result enqueue(Operation op, CUstream stream) {
    if (op.comm == nullptr) return refuse(kInvalidArgument, "no communicator");
    if (op.receive == nullptr && op.kind != Kind::kSend) return refuse(kInvalidArgument, "nothing to receive into");
    if (op.send == nullptr && op.kind != Kind::kReceive) return refuse(kInvalidArgument, "nothing to send");
    if (op.peer < 0 || op.peer >= op.comm->group->ranks) return refuse(kInvalidArgument, "no such rank");
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    if (cuStreamIsCapturing(stream, &status) != CUDA_SUCCESS || status != CU_STREAM_CAPTURE_STATUS_NONE) {
        return refuse(kInvalidUsage, "captured streams are not emulated");
    }
    if (depth > 0) return pending.push_back(std::move(op)), kSuccess;
    std::vector<Operation> one;
    one.push_back(std::move(op));
    return run(std::move(one));
}

}  // namespace

EXPORT void emulator_nccl_stall(int operations) { stalls = operations; }

EXPORT int ncclGetVersion(int* version) {
    const char* text = getenv("CANDLE_MOE_EMULATOR_NCCL_VERSION");
    return *version = text == nullptr ? 22803 : atoi(text), kSuccess;
}

EXPORT int ncclGetUniqueId(UniqueId* id) {
    const Lock lock(the_lock);
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "emulated %llu", static_cast<unsigned long long>(++ids));
    return kSuccess;
}

EXPORT int ncclCommInitRank(ncclComm** comm, int ranks, UniqueId id, int rank) {
    if (rank < 0 || rank >= ranks) return refuse(kInvalidArgument, "no such rank");
    Lock lock(the_lock);
    auto& group = groups[id.internal];
    if (!group) group = std::make_shared<Group>();
    const auto mine = group;
    mine->ranks = ranks;
    ++mine->joined;
    changed.notify_all();
    while (mine->joined < ranks) changed.wait(lock);
    *comm = new ncclComm{mine, rank};
    return kSuccess;
}

// It is never released: a thread may be about to find out that it was aborted.
EXPORT int ncclCommAbort(ncclComm* comm) {
    const Lock lock(the_lock);
    comm->aborted = true;
    changed.notify_all();
    return kSuccess;
}

EXPORT int ncclCommDestroy(ncclComm* comm) { return delete comm, kSuccess; }
EXPORT int ncclCommGetAsyncError(ncclComm* comm, int* error) {
    const Lock lock(the_lock);
    return *error = comm->aborted ? kRemoteError : kSuccess, kSuccess;
}

EXPORT const char* ncclGetErrorString(int result) {
    switch (result) {
        case kSuccess: return "no error";
        case kInvalidArgument: return "invalid argument";
        case kInvalidUsage: return "invalid usage";
        case kRemoteError: return "remote process exited or there was a network error";
        default: return "error of the emulated library";
    }
}
EXPORT const char* ncclGetLastError(ncclComm*) { return last_words.c_str(); }

EXPORT int ncclGroupStart() { return ++depth, kSuccess; }
EXPORT int ncclGroupEnd() {
    if (depth == 0) return refuse(kInvalidUsage, "no group to end");
    if (--depth > 0) return kSuccess;
    std::vector<Operation> operations;
    operations.swap(pending);
    return run(std::move(operations));
}

EXPORT int ncclAllGather(const void* send, void* receive, size_t count, int type, ncclComm* comm, CUstream stream) {
    return enqueue({Kind::kAllGather, comm, send, receive, count, type, 0, 0, nullptr}, stream);
}
EXPORT int ncclBroadcast(
    const void* send, void* receive, size_t count, int type, int root, ncclComm* comm, CUstream stream) {
    return enqueue({Kind::kBroadcast, comm, send, receive, count, type, root, 0, nullptr}, stream);
}
EXPORT int ncclAllReduce(
    const void* send, void* receive, size_t count, int type, int, ncclComm* comm, CUstream stream) {
    return enqueue({Kind::kAllReduce, comm, send, receive, count, type, 0, 0, nullptr}, stream);
}
EXPORT int ncclReduce(
    const void* send, void* receive, size_t count, int type, int, int root, ncclComm* comm, CUstream stream) {
    return enqueue({Kind::kReduce, comm, send, receive, count, type, root, 0, nullptr}, stream);
}
EXPORT int ncclReduceScatter(
    const void* send, void* receive, size_t count, int type, int, ncclComm* comm, CUstream stream) {
    return enqueue({Kind::kReduceScatter, comm, send, receive, count, type, 0, 0, nullptr}, stream);
}
EXPORT int ncclSend(const void* send, size_t count, int type, int peer, ncclComm* comm, CUstream stream) {
    return enqueue({Kind::kSend, comm, send, nullptr, count, type, peer, 0, nullptr}, stream);
}
EXPORT int ncclRecv(void* receive, size_t count, int type, int peer, ncclComm* comm, CUstream stream) {
    return enqueue({Kind::kReceive, comm, nullptr, receive, count, type, peer, 0, nullptr}, stream);
}
