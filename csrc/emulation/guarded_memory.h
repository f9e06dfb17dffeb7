// Buffers between two inaccessible pages, so that device code which leaves them is caught.
#pragma once

#include <cstddef>

namespace lens::emulation {

// Writes "accessed <address>, n bytes past the end of 'x'" or the like; called from the fault
// handler.
void describe_address(const void* address, char* text, size_t size);

// Whether [start, start + bytes) lies in one buffer; if not, writes where it leaves it.
bool in_one_buffer(const void* start, size_t bytes, char* text, size_t size);

}  // namespace lens::emulation
