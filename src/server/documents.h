// Files that the server hands out as they are, embedded when CMake configures.
#pragma once

namespace relay::server {

extern const char* const kPage;     ///< page.html
extern const char* const kOpenApi;  ///< openapi.json

}  // namespace relay::server
