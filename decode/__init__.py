"""The decode half of a room: reserve, take, verify, admit, stream."""
