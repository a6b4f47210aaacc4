/* The header is C: this file is compiled as C. */
#include "relay/relay.h"

size_t relay_inputs_size_in_c(void) { return sizeof(relay_inputs); }
