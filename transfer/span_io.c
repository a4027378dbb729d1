/* Moves many spans of a memory through a descriptor in one call; span_io.py says how it is used.
 *
 * The kernel copies straight into or out of the spans. While it is busy with one system call nothing is fetched for the
 * next, so each call is preceded by a look at the beginning of every system page that it will touch: their misses in
 * the page tables and the caches, which spans at random places would pay one after the other, then happen side by side.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "span.h"

#define EXPORT __attribute__((visibility("default")))

enum { PARTS = 128, SYSTEM_PAGE = 4096, LINE = 64, BEGINNING = 8 * LINE, LOOKED_AT = 64 << 10 };

static inline void look_at(const uint8_t *start, int64_t nbytes) {
    if (nbytes > LOOKED_AT) return; /* what is long follows on by itself */
    for (int64_t page = 0; page < nbytes; page += SYSTEM_PAGE)
        for (int64_t at = page; at < page + BEGINNING; at += LINE) __builtin_prefetch(start + at);
}

/* The spans from `place` on as parts of one system call, up to `max_bytes` bytes; returns how many parts. */
static int gather_parts(struct iovec *parts, uint8_t *memory, const int64_t *offsets, const int64_t *lengths,
                        int64_t count, const int64_t *place, int64_t max_bytes) {
    int used = 0;
    for (int64_t i = place[0], at = place[1]; i < count && used < PARTS && max_bytes > 0; i++, at = 0) {
        const int64_t rest = lengths[i] - at, length = rest < max_bytes ? rest : max_bytes;
        if (length == 0) continue;
        parts[used].iov_base = memory + offsets[i] + at;
        parts[used++].iov_len = (size_t)length;
        look_at(memory + offsets[i] + at, length);
        max_bytes -= length;
    }
    return used;
}

static void pass(const int64_t *lengths, int64_t count, int64_t *place, int64_t moved) {
    int64_t i = place[0], at = place[1] + moved;
    while (i < count && at >= lengths[i]) at -= lengths[i++];
    place[0] = i, place[1] = at;
}

/* How many bytes `count` spans have together; or, if span i is not inside a memory of `nbytes` bytes, -1 - i. */
EXPORT int64_t pd_spans_inside(int64_t nbytes, const int64_t *offsets, const int64_t *lengths, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!is_inside(nbytes, offsets[i], lengths[i])) return -1 - i;
        total += lengths[i];
    }
    return total;
}

/* Sends the next bytes of spans that were checked: pieces of `piece` bytes, until the socket takes no more or there are
 * `max_bytes`. Returns how many it took, or -errno. `place` is the span and the byte in it that is next, before and
 * after. */
EXPORT int64_t pd_send_spans(int socket, uint8_t *memory, const int64_t *offsets, const int64_t *lengths, int64_t count,
                             int64_t *place, int64_t piece, int64_t max_bytes) {
    struct iovec parts[PARTS];
    int64_t done = 0;
    while (done < max_bytes && place[0] < count) {
        const int64_t room = max_bytes - done, offered = piece < room ? piece : room;
        struct msghdr message = {.msg_iov = parts};
        message.msg_iovlen = (size_t)gather_parts(parts, memory, offsets, lengths, count, place, offered);
        const ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL);
        if (sent < 0) return done ? done : -errno;
        pass(lengths, count, place, sent);
        done += sent;
    }
    return done;
}

/* Receives the next bytes, at most `max_bytes`, into spans that were checked. Returns how many came, 0 when the other
 * side has closed the connection, or -errno. */
EXPORT int64_t pd_receive_spans(int socket, uint8_t *memory, const int64_t *offsets, const int64_t *lengths,
                                int64_t count, int64_t *place, int64_t max_bytes) {
    struct iovec parts[PARTS];
    struct msghdr message = {.msg_iov = parts};
    message.msg_iovlen = (size_t)gather_parts(parts, memory, offsets, lengths, count, place, max_bytes);
    const ssize_t received = recvmsg(socket, &message, 0);
    if (received < 0) return -errno;
    pass(lengths, count, place, received);
    return received;
}

/* Reads `size` bytes at `places[i]` of file `files[i]` to `targets[i]`, for every i; those that follow each other in a
 * file are read together. Returns `count`, the index of the first that its file is too short for, or -errno. */
EXPORT int64_t pd_read_spans(const int *files, const int64_t *places, uint8_t *memory, const int64_t *targets,
                             int64_t size, int64_t count) {
    struct iovec parts[PARTS];
    for (int64_t first = 0; first < count;) {
        int64_t i = first;
        int used = 0;
        do {
            uint8_t *to = memory + targets[i];
            if (used && (uint8_t *)parts[used - 1].iov_base + parts[used - 1].iov_len == to) {
                parts[used - 1].iov_len += (size_t)size;
            } else {
                parts[used].iov_base = to;
                parts[used++].iov_len = (size_t)size;
                look_at(to, size);
            }
            i++;
        } while (i < count && used < PARTS && files[i] == files[first] && places[i] == places[i - 1] + size);
        ssize_t found;
        do found = preadv(files[first], parts, used, places[first]);
        while (found < 0 && errno == EINTR);
        if (found < 0) return -errno;
        if (found != (i - first) * size) return first + found / size;
        first = i;
    }
    return count;
}
