#include "cli/help.h"

#include <sstream>

namespace relay::cli {

namespace {

constexpr size_t kColumn = 30;
constexpr size_t kWidth = 92;

std::string entry(const std::string& name, const std::string& description) {
  std::string out = "  " + name;
  out += out.size() + 2 > kColumn ? "\n" + std::string(kColumn, ' ')
                                  : std::string(kColumn - out.size(), ' ');
  size_t at = kColumn;
  std::istringstream words(description);
  for (std::string word; words >> word;) {
    if (at > kColumn && at + 1 + word.size() > kWidth) {
      out += "\n" + std::string(kColumn, ' ');
      at = kColumn;
    }
    if (at > kColumn) {
      out += ' ';
      ++at;
    }
    out += word;
    at += word.size();
  }
  return out + "\n";
}

std::string value_word(const CLI::Option& option) {
  if (option.get_type_size() == 0) return "";  // a flag
  if (!option.get_option_text().empty()) return " " + option.get_option_text();
  const std::string type = option.get_type_name();
  const std::string plain = type.substr(0, type.find(':'));  // without its checks
  return plain == "INT" || plain == "UINT" || plain == "FLOAT" ? " N" : " " + plain;
}

}  // namespace

std::string HelpFormatter::make_option(const CLI::Option* option, bool is_positional) const {
  std::string name;
  if (is_positional) {
    name = option->get_name(true, false);
  } else {
    for (const std::string& s : option->get_snames()) name += (name.empty() ? "-" : ", -") + s;
    for (const std::string& l : option->get_lnames()) name += (name.empty() ? "--" : ", --") + l;
    name += value_word(*option);
  }
  std::string description = option->get_description();
  std::string facts;
  const auto add = [&](const std::string& fact) { facts += (facts.empty() ? "" : "; ") + fact; };
  if (option->get_required() && !is_positional) add("required");
  std::string value = option->get_default_str();
  if (!value.empty() && value.front() == '[') value = value.substr(1, value.size() - 2);  // a list
  if (!value.empty()) add("default " + value);
  if (!option->get_envname().empty()) add(option->get_envname());
  if (!facts.empty()) description += " [" + facts + "]";
  return entry(name, description);
}

std::string HelpFormatter::make_subcommand(const CLI::App* sub) const {
  return entry(sub->get_display_name(true), sub->get_description());
}

}  // namespace relay::cli
