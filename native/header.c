/* The header of a frame: what fastsplit/schema/header.py does; read that first. */

#include "native.h"

#include <string.h>

enum { VERSION = 1, LAST_KIND = 12 };

void native_write_header(unsigned char *out, const Header *header) {
    memcpy(out, "FSPL", 4);
    out[4] = VERSION;
    out[5] = (unsigned char)header->kind;
    native_write(out + 6, header->flags, 2);
    native_write(out + 8, header->request_id, 8);
    native_write(out + 16, header->metadata_nbytes, 4);
    native_write(out + 20, header->varying_nbytes, 4);
    native_write(out + 24, header->payload_nbytes, 8);
    native_write(out + 32, header->time_ns, 8);
}

int native_read_header(const unsigned char *in, Header *header) {
    header->kind = in[5];
    header->flags = native_read(in + 6, 2);
    header->request_id = native_read(in + 8, 8);
    header->metadata_nbytes = native_read(in + 16, 4);
    header->varying_nbytes = native_read(in + 20, 4);
    header->payload_nbytes = native_read(in + 24, 8);
    header->time_ns = native_read(in + 32, 8);
    return memcmp(in, "FSPL", 4) == 0 && in[4] == VERSION && header->kind >= 1 && header->kind <= LAST_KIND &&
           header->varying_nbytes <= header->metadata_nbytes;
}
