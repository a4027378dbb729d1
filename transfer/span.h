/* What every list of spans is asked before the first of them is moved. */

#include <stdint.h>

/* Whether `length` bytes at `offset` are inside a memory of `nbytes` bytes, whatever the numbers are. */
static inline int is_inside(int64_t nbytes, int64_t offset, int64_t length) {
    return length >= 0 && offset >= 0 && length <= nbytes && offset <= nbytes - length;
}
