// The threads of one parallel region: how they share loops and wait for each other.
//
// OpenMP makes the threads (so that they are torch's own), but its barriers spin for milliseconds; where processes
// share cores, the thread waited for is often waiting for that very core. These barriers spin for some
// microseconds, then yield. Loops are dealt out in chunks as threads come for them, so a thread that lost its core
// holds up one chunk only.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pd {

inline void relax_processor() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// What the threads of one region share: made outside it, by the thread that enters.
struct Meeting {
    alignas(64) std::atomic<int64_t> next{0};  // of the loop now being shared
    alignas(64) std::atomic<int32_t> arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
};

class Team {
  public:
    Team(Meeting& meeting, int index, int size) : meeting_(meeting), index_(index), size_(size) {}

    int index() const { return index_; }

    // Runs f(i) for each i below `total`, once in the whole team, neighbours in one chunk. A barrier must follow
    // before the next loop.
    template <typename F>
    void share(int64_t total, int64_t chunk, const F& f) {
        if (size_ == 1) {
            for (int64_t i = 0; i < total; ++i) f(i);
            return;
        }
        for (;;) {
            const int64_t from = meeting_.next.fetch_add(chunk, std::memory_order_relaxed);
            if (from >= total) return;
            for (int64_t i = from; i < std::min(total, from + chunk); ++i) f(i);
        }
    }

    // As share, in about `kChunksPerThread` chunks for each thread.
    template <typename F>
    void share(int64_t total, const F& f) {
        share(total, std::max<int64_t>(1, total / (static_cast<int64_t>(size_) * kChunksPerThread)), f);
    }

    // Returns when all threads have called it; what they wrote before is visible after.
    void barrier() {
        if (size_ == 1) return;
        const uint32_t round = meeting_.round.load(std::memory_order_relaxed);
        if (meeting_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            meeting_.arrived.store(0, std::memory_order_relaxed);
            meeting_.next.store(0, std::memory_order_relaxed);
            meeting_.round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; meeting_.round.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < kSpins) {
                relax_processor();
            } else {
                sched_yield();
            }
        }
    }

  private:
    static constexpr int kChunksPerThread = 4;
    static constexpr int kSpins = 2000;

    Meeting& meeting_;
    const int index_;
    const int size_;
};

}  // namespace pd
