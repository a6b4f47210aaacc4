// What --help looks like: names and a word for the value, then the description in a column of its
// own, wrapped, with default and environment variable at its end.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace relay::cli {

class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option(const CLI::Option* option, bool is_positional) const override;
  std::string make_subcommand(const CLI::App* sub) const override;
};

}  // namespace relay::cli
