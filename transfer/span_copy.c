/* Copies many spans from one memory into another in one call; span_copy.py says how it is used.
 *
 * A span moves in groups of up to 16 KB, each as four streams side by side, while what comes next is already being
 * fetched, also across the end of a span: a span at a random place then costs little more than one that follows on,
 * because its misses in the caches and in the page tables are over when its turn comes.
 */

#include <stdint.h>
#include <string.h>

#include "span.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { LINE = 64, STEP = 2 * LINE, STREAMS = 4, GROUP = 16 << 10, AHEAD = 256, SPANS_AHEAD = 2, SYSTEM_PAGE = 4096 };

/* 64 bytes past the caches; `to` is aligned to 64. */
static inline void stream_line(uint8_t *to, const uint8_t *from) {
#if defined(__SSE2__)
    const __m128i a = _mm_loadu_si128((const __m128i *)from);
    const __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
    const __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
    const __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
    _mm_stream_si128((__m128i *)to, a);
    _mm_stream_si128((__m128i *)(to + 16), b);
    _mm_stream_si128((__m128i *)(to + 32), c);
    _mm_stream_si128((__m128i *)(to + 48), d);
#else
    memcpy(to, from, LINE);
#endif
}

/* `next` is what will be read after these `nbytes`; returns how many of them were copied, a multiple of 512. */
static inline int64_t copy_group(uint8_t *to, const uint8_t *from, int64_t nbytes, const uint8_t *next, int streaming) {
    const int64_t stride = nbytes / (STREAMS * STEP) * STEP;
    for (int64_t at = 0; at < stride; at += STEP) {
        const uint8_t *soon = at + AHEAD < stride ? from + at + AHEAD : next + (at + AHEAD - stride);
        for (int stream = 0; stream < STREAMS; stream++) {
            __builtin_prefetch(soon + stream * stride);
            __builtin_prefetch(soon + stream * stride + LINE);
        }
        for (int stream = 0; stream < STREAMS; stream++) {
            const int64_t here = stream * stride + at;
            if (streaming) {
                stream_line(to + here, from + here);
                stream_line(to + here + LINE, from + here + LINE);
            } else {
                memcpy(to + here, from + here, STEP);
            }
        }
    }
    return STREAMS * stride;
}

static inline void copy_span(uint8_t *to, const uint8_t *from, int64_t nbytes, const uint8_t *next, int streaming) {
    int64_t head = (int64_t)(-(uintptr_t)to & (LINE - 1));
    if (head > nbytes) head = nbytes;
    memcpy(to, from, (size_t)head);
    to += head, from += head, nbytes -= head;
    while (nbytes >= STREAMS * STEP) {
        const int64_t group = nbytes < GROUP ? nbytes : GROUP;
        const int64_t done = copy_group(to, from, group, nbytes > GROUP ? from + GROUP : next, streaming);
        to += done, from += done, nbytes -= done;
    }
    memcpy(to, from, (size_t)nbytes);
}

/* One look at each page of a span, so that it is found in the page tables and its first bytes are in the cache. */
static inline void foresee(const uint8_t *to, const uint8_t *from, int64_t nbytes) {
    if (nbytes > GROUP) nbytes = GROUP;
    for (int64_t at = 0; at < nbytes; at += SYSTEM_PAGE) {
        __builtin_prefetch(to + at, 1);
        __builtin_prefetch(from + at);
    }
}

/* -1, or the first of `count` spans that is not inside a memory of `nbytes` bytes. */
__attribute__((visibility("default"))) int64_t pd_check_spans(int64_t nbytes, const int64_t *offsets,
                                                              const int64_t *lengths, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!is_inside(nbytes, offsets[i], lengths[i])) return i;
    return -1;
}

/* Copies the next `max_bytes` bytes of spans that were checked, or what is left of them; returns how many. `place` is
 * the span and the byte in it that is next, before and after. Without `targets` the bytes of this call lie one behind the
 * other from the target's beginning. */
__attribute__((visibility("default"))) int64_t pd_copy_spans(uint8_t *target, const uint8_t *source,
                                                             const int64_t *targets, const int64_t *sources,
                                                             const int64_t *lengths, int64_t count, int64_t *place,
                                                             int streaming, int64_t max_bytes) {
    int64_t i = place[0], at = place[1], done = 0;
    while (i < count && done < max_bytes) {
        const int64_t then = i + SPANS_AHEAD, following = i + 1 < count ? i + 1 : i;
        if (at == 0 && then < count)
            foresee(targets ? target + targets[then] : target + done, source + sources[then], lengths[then]);
        const int64_t rest = lengths[i] - at, room = max_bytes - done, length = rest < room ? rest : room;
        uint8_t *to = target + (targets ? targets[i] + at : done);
        const uint8_t *from = source + sources[i] + at, *next = source + sources[following];
        if (streaming)
            copy_span(to, from, length, next, 1);
        else
            copy_span(to, from, length, next, 0);
        done += length, at += length;
        if (at == lengths[i]) i++, at = 0;
    }
    place[0] = i, place[1] = at;
#if defined(__SSE2__)
    if (streaming) _mm_sfence(); /* or the bytes could come after the news of them */
#endif
    return done;
}
