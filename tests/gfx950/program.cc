// Loads a code object: the ELF image, the kernels' descriptors, and the program that llvm-objdump prints.
#include <elf.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>

#include "machine.h"

namespace gfx950 {
namespace {

// ---- The text of one instruction.

[[noreturn]] void cannot_read(const std::string& line, const std::string& why) {
  throw Fault("software gfx950: cannot read \"" + line + "\": " + why);
}

std::string strip(const std::string& s) {
  size_t a = s.find_first_not_of(" \t"), b = s.find_last_not_of(" \t");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

bool starts_with(const std::string& s, const char* prefix) { return s.rfind(prefix, 0) == 0; }

int number(const std::string& s) { return static_cast<int>(strtoll(s.c_str(), nullptr, 0)); }

// "[a,b,c]" -> {a, b, c}
std::vector<int> bracketed(const std::string& s) {
  std::vector<int> out;
  std::stringstream in(s.substr(s.find('[') + 1));
  for (std::string item; std::getline(in, item, ',');) out.push_back(number(item));
  return out;
}

uint8_t bits_of(const std::vector<int>& flags) {
  uint8_t out = 0;
  for (size_t k = 0; k < flags.size(); ++k) out |= flags[k] << k;
  return out;
}

const std::map<std::string, int>& special_registers() {
  static const std::map<std::string, int> names = {{"vcc", kVcc},
                                                   {"vcc_lo", kVcc},
                                                   {"vcc_hi", kVcc + 1},
                                                   {"exec", kExec},
                                                   {"exec_lo", kExec},
                                                   {"exec_hi", kExec + 1},
                                                   {"m0", kM0},
                                                   {"flat_scratch", 102},
                                                   {"flat_scratch_lo", 102},
                                                   {"flat_scratch_hi", 103},
                                                   {"xnack_mask", 104}};
  return names;
}

// v3, v[0:3], a[4:5], s[0:1], vcc, exec, m0, off, constants; with -x, |x|, neg(x), abs(x), sext(x) around.
Operand parse_operand(std::string text, const std::string& line) {
  Operand op;
  for (bool again = true; again;) {
    again = false;
    const char letter = text[0];
    if (letter == '-' && text.size() > 1 && (isalpha(text[1]) || text[1] == '|')) {
      op.negate = true, text = text.substr(1), again = true;
    } else if (letter == '|') {
      op.absolute = true, text = text.substr(1, text.size() - 2), again = true;
    }
    for (auto [name, flag] : {std::pair{"neg(", &op.negate}, {"abs(", &op.absolute}, {"sext(", &op.sign_extend}})
      if (starts_with(text, name))
        *flag = true, text = text.substr(strlen(name), text.size() - strlen(name) - 1), again = true;
  }
  const char bank = text[0];
  if ((bank == 'v' || bank == 's' || bank == 'a') && text.size() > 1 && (isdigit(text[1]) || text[1] == '[')) {
    op.kind = bank == 's' ? Operand::kSgpr : Operand::kVgpr;
    if (text[1] == '[') {
      int first = 0, last = 0;
      if (sscanf(text.c_str() + 2, "%d:%d", &first, &last) == 1) last = first;
      op.reg = first, op.count = last - first + 1;
    } else {
      op.reg = number(text.substr(1));
    }
    if (bank == 'a') op.reg += kAccum;
    return op;
  }
  if (auto it = special_registers().find(text); it != special_registers().end()) {
    op.kind = Operand::kSgpr, op.reg = it->second;
    op.count = text == "vcc" || text == "exec" || text == "flat_scratch" || text == "xnack_mask" ? 2 : 1;
    return op;
  }
  if (text == "off") return op.kind = Operand::kOff, op;
  if (text == "scc" || text == "src_scc") return op.kind = Operand::kScc, op;
  if (text == "vccz" || text == "src_vccz") return op.kind = Operand::kVccz, op;
  if (text == "execz" || text == "src_execz") return op.kind = Operand::kExecz, op;
  if (text == "src_shared_base" || text == "src_private_base") {
    op.kind = Operand::kConstant, op.bits64 = text == "src_shared_base" ? kSharedAperture : kPrivateAperture;
    op.bits32 = static_cast<uint32_t>(op.bits64);
    return op;
  }
  if (starts_with(text, "lit(")) text = text.substr(4, text.size() - 5);
  if (starts_with(text, "lit64(")) text = text.substr(6, text.size() - 7);
  if (!isdigit(text[0]) && text[0] != '-') cannot_read(line, "operand " + text);
  op.kind = Operand::kConstant;
  if (text.find('.') != std::string::npos) {  // an inline float: its bits in the width of the operand
    const double value = strtod(text.c_str(), nullptr);
    const float narrow = static_cast<float>(value);
    memcpy(&op.bits32, &narrow, 4);
    memcpy(&op.bits64, &value, 8);
  } else if (starts_with(text, "0x")) {
    op.bits64 = strtoull(text.c_str(), nullptr, 16);
    op.bits32 = static_cast<uint32_t>(op.bits64);
  } else {
    op.bits64 = static_cast<uint64_t>(strtoll(text.c_str(), nullptr, 10));
    op.bits32 = static_cast<uint32_t>(op.bits64);
  }
  return op;
}

Instruction::Select parse_select(const std::string& s, const std::string& line) {
  static const std::map<std::string, Instruction::Select> names = {
      {"BYTE_0", Instruction::kByte0}, {"BYTE_1", Instruction::kByte1}, {"BYTE_2", Instruction::kByte2},
      {"BYTE_3", Instruction::kByte3}, {"WORD_0", Instruction::kWord0}, {"WORD_1", Instruction::kWord1},
      {"DWORD", Instruction::kDword}};
  auto it = names.find(s);
  if (it == names.end()) cannot_read(line, "SDWA selector " + s);
  return it->second;
}

// Where each lane's first source comes from under a DPP control, or nothing if the word is not one.
bool dpp_control(const std::string& word, std::array<int8_t, kLanes>& from) {
  const std::string name = word.substr(0, word.find(':'));
  const std::vector<int> n = word.find('[') != std::string::npos ? bracketed(word) : std::vector<int>{};
  const int by = word.find(':') != std::string::npos && n.empty() ? number(word.substr(word.find(':') + 1)) : 0;
  std::function<int(int)> source;  // of a lane; -1: none
  if (name == "quad_perm") source = [&](int l) { return (l & ~3) | n[l & 3]; };
  if (name == "row_newbcast") source = [&](int l) { return (l & ~15) | by; };
  if (name == "row_shl") source = [&](int l) { return (l & 15) + by < 16 ? l + by : -1; };
  if (name == "row_shr") source = [&](int l) { return (l & 15) >= by ? l - by : -1; };
  if (name == "row_ror") source = [&](int l) { return (l & ~15) | ((l - by) & 15); };
  if (name == "wave_shl") source = [&](int l) { return l + 1 < kLanes ? l + 1 : -1; };
  if (name == "wave_shr") source = [&](int l) { return l - 1; };
  if (name == "wave_rol") source = [&](int l) { return (l + 1) & 63; };
  if (name == "wave_ror") source = [&](int l) { return (l - 1) & 63; };
  if (name == "row_mirror") source = [&](int l) { return l ^ 15; };
  if (name == "row_half_mirror") source = [&](int l) { return l ^ 7; };
  // Lane 15 of each row (or lane 31) to the whole of the next row (or the upper half); the lanes before keep their own.
  if (name == "row_bcast" && by == 15) source = [&](int l) { return l >= 16 ? (l & ~15) - 1 : -1; };
  if (name == "row_bcast" && by == 31) source = [&](int l) { return l >= 32 ? 31 : -1; };
  if (!source) return false;
  for (int l = 0; l < kLanes; ++l) from[l] = static_cast<int8_t>(source(l));
  return true;
}

// A word that follows the operands.
void parse_modifier(Instruction& i, const std::string& word, const std::string& line, int& row_mask, int& bank_mask) {
  const std::string name = word.substr(0, word.find(':'));
  const std::string rest = word.find(':') == std::string::npos ? "" : word.substr(word.find(':') + 1);
  std::array<int8_t, kLanes> from;
  if (dpp_control(word, from)) {
    i.dpp = std::make_shared<std::array<int8_t, kLanes>>(from);
  } else if (name == "row_mask")
    row_mask = number(rest);
  else if (name == "bank_mask")
    bank_mask = number(rest);
  else if (name == "bound_ctrl")
    i.bound_ctrl = true;  // printed only when set, as :0 or :1
  else if (name == "bitop3")
    i.bitop3 = static_cast<uint8_t>(strtol(rest.c_str(), nullptr, 16));
  else if (name == "offset" && starts_with(rest, "swizzle(")) {  // parse() takes it from the encoding
  } else if (name == "offset" || name == "offset0")
    i.offset = number(rest);
  else if (name == "offset1")
    i.offset1 = number(rest);
  else if (name == "op_sel")
    i.op_sel = bits_of(bracketed(word));
  else if (name == "op_sel_hi")
    i.op_sel_hi = bits_of(bracketed(word));
  else if (name == "neg_lo")
    i.neg_lo = bits_of(bracketed(word));
  else if (name == "neg_hi")
    i.neg_hi = bits_of(bracketed(word));
  else if (name == "clamp")
    i.clamp = true;
  else if (name == "mul")
    i.scale = static_cast<float>(number(rest));
  else if (name == "div")
    i.scale = 1.0f / number(rest);
  else if (name == "lds")
    i.lds = true;
  else if (name == "offen")
    i.offen = true;
  else if (name == "dst_sel")
    i.sdwa = true, i.select_dst = parse_select(rest, line);
  else if (name == "src0_sel")
    i.sdwa = true, i.select_src[0] = parse_select(rest, line);
  else if (name == "src1_sel")
    i.sdwa = true, i.select_src[1] = parse_select(rest, line);
  else if (name == "dst_unused")
    i.sdwa_preserve = rest == "UNUSED_PRESERVE", i.sdwa_sign_extend = rest == "UNUSED_SEXT";
  else if (starts_with(word, "gpr_idx(")) {
    const char* roles[] = {"SRC0", "SRC1", "SRC2", "DST"};
    for (int k = 0; k < 4; ++k) i.gpr_index_mode |= (word.find(roles[k]) != std::string::npos) << k;
  } else if (word == "sc0")
    i.returns = true;  // on an atomic: the old value comes back; on others a cache hint
  else if (word == "sc1" || word == "nt" || word == "glc" || word == "slc") {  // caches are not modelled
  } else
    cannot_read(line, "modifier " + word);
}

std::vector<std::string> split_outside_brackets(const std::string& s, char separator) {
  std::vector<std::string> out(1);
  int depth = 0;
  for (char c : s) {
    depth += (c == '[' || c == '(') - (c == ']' || c == ')');
    if (c == separator && depth == 0)
      out.emplace_back();
    else
      out.back() += c;
  }
  return out;
}

bool is_program_control(uint32_t word) { return word >> 23 == 0x17f; }  // SOPP
bool has_immediate_k(uint32_t word) { return word >> 28 == 0xb; }       // SOPK

Instruction parse(const std::string& line, uint64_t address, uint32_t encoding) {
  Instruction i;
  i.text = strip(line), i.address = address;
  const size_t space = i.text.find(' ');
  std::string mnemonic = i.text.substr(0, space);
  for (const char* suffix : {"_e32", "_e64", "_dpp", "_sdwa"}) {
    const size_t n = strlen(suffix);
    if (mnemonic.size() > n && mnemonic.compare(mnemonic.size() - n, n, suffix) == 0)
      mnemonic.resize(mnemonic.size() - n);
  }
  if (architecture() == "gfx942" && mnemonic.find("fp8") != std::string::npos) mnemonic += " fnuz";
  const Opcode* opcode = find_opcode(mnemonic);
  if (!opcode) cannot_read(i.text, "unknown instruction " + mnemonic);
  i.execute = opcode->execute, i.kind = opcode->kind;
  // The text of SOPP operands (waits, branch targets) and of swizzles is for people; the encoding is unambiguous.
  if (mnemonic == "ds_swizzle_b32") i.immediate = encoding & 0xffff;
  if (is_program_control(encoding) || has_immediate_k(encoding)) i.immediate = encoding & 0xffff;
  if (is_program_control(encoding) || space == std::string::npos) return i;

  int row_mask = 0xf, bank_mask = 0xf;
  for (const std::string& chunk : split_outside_brackets(i.text.substr(space + 1), ',')) {
    bool first = true;
    for (const std::string& word : split_outside_brackets(strip(chunk), ' ')) {
      if (word.empty()) continue;
      if (first && !starts_with(word, "gpr_idx("))
        i.operands.push_back(parse_operand(word, line));
      else
        parse_modifier(i, word, line, row_mask, bank_mask);
      first = false;
    }
  }
  if (i.dpp) {
    auto write = std::make_shared<Lanes>();
    for (int l = 0; l < kLanes; ++l)
      (*write)[l] = (row_mask >> (l / 16) & 1) && (bank_mask >> (l % 16 / 4) & 1) ? ~0u : 0;
    i.dpp_write = write;
  }
  i.nontrivial = i.dpp || i.sdwa || i.clamp || i.scale != 1.0f;
  return i;
}

// What cannot be read is a fault when it is reached: a code object may hold kernels that nobody launches.
Instruction parse_or_defer(const std::string& line, uint64_t address, uint32_t encoding) {
  try {
    return parse(line, address, encoding);
  } catch (const Fault& reason) {
    Instruction i;
    i.text = reason.what(), i.address = address, i.kind = Class::kControl, i.not_modelled = true;
    i.execute = [](Wave& w, const Instruction& self) { fault(w, self, "not modelled"); };
    return i;
  }
}

// ---- The disassembler, a subprocess.

std::string disassembler() {
  if (const char* named = getenv("JAX_DSV4_LLVM_OBJDUMP")) return named;
  for (const char* name : {"llvm-objdump-22", "llvm-objdump-21", "llvm-objdump-20", "llvm-objdump"})
    if (system((std::string("command -v ") + name + " >/dev/null 2>&1").c_str()) == 0) return name;
  throw Fault("software gfx950: no llvm-objdump (version 20 or newer): install llvm or set JAX_DSV4_LLVM_OBJDUMP");
}

std::string disassemble(const void* elf, size_t size, const std::string& architecture) {
  char path[] = "/tmp/gfx950-XXXXXX";
  const int file = mkstemp(path);
  if (file < 0 || write(file, elf, size) != static_cast<ssize_t>(size))
    throw Fault("software gfx950: cannot write /tmp");
  close(file);
  std::string out;
  FILE* pipe = popen((disassembler() + " -d --mcpu=" + architecture + " " + path).c_str(), "r");
  char buffer[65536];
  for (size_t n; pipe && (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) out.append(buffer, n);
  const int status = pipe ? pclose(pipe) : -1;
  unlink(path);
  if (status != 0) throw Fault("software gfx950: " + disassembler() + " failed");
  return out;
}

// Lines read "\tmnemonic operands // 000000002300: 8601FF01 0000FFFF".
void read_instructions(Program& program, const std::string& text) {
  std::stringstream in(text);
  std::vector<uint32_t> encodings;
  for (std::string line; std::getline(in, line);) {
    const size_t comment = line.rfind("//");
    if (line.empty() || line[0] != '\t' || comment == std::string::npos) continue;
    unsigned long long address = 0;
    unsigned int encoding = 0;
    if (sscanf(line.c_str() + comment, "// %llx: %x", &address, &encoding) != 2) continue;
    program.by_address[address] = static_cast<int>(program.instructions.size());
    program.instructions.push_back(parse_or_defer(line.substr(0, comment), address, encoding));
    encodings.push_back(encoding);
  }
  for (size_t k = 0; k < encodings.size(); ++k) {
    Instruction& i = program.instructions[k];
    if (!starts_with(i.text, "s_branch") && !starts_with(i.text, "s_cbranch")) continue;
    auto target = program.by_address.find(i.address + 4 + 4 * int64_t{static_cast<int16_t>(i.immediate)});
    if (target == program.by_address.end()) cannot_read(i.text, "branch into nothing");
    i.target = target->second;
  }
}

template <class T>
const T* at(const void* elf, size_t size, uint64_t offset) {
  if (offset + sizeof(T) > size) throw Fault("code object: truncated ELF");
  return reinterpret_cast<const T*>(static_cast<const uint8_t*>(elf) + offset);
}

}  // namespace

std::string architecture() {
  const char* named = getenv("GFX950_ARCHITECTURE");
  return named ? named : "gfx950";
}

std::shared_ptr<Program> load_program(const void* elf, size_t size, Memory& memory) {
  jax_dsv4::rocm::CodeObjectNotes notes;
  std::string reason;
  if (!jax_dsv4::rocm::read_notes(elf, size, &notes, &reason)) throw Fault("code object: " + reason);
  if (notes.architecture != architecture()) throw Fault("code object: not for " + architecture());

  auto program = std::make_shared<Program>();
  const auto* header = at<Elf64_Ehdr>(elf, size, 0);
  for (int k = 0; k < header->e_phnum; ++k) {
    const auto* segment = at<Elf64_Phdr>(elf, size, header->e_phoff + k * sizeof(Elf64_Phdr));
    if (segment->p_type == PT_LOAD)
      program->image_bytes = std::max(program->image_bytes, segment->p_vaddr + segment->p_memsz);
  }
  constexpr uint64_t kPage = 4096;
  program->image_bytes = (program->image_bytes + kPage - 1) / kPage * kPage;
  program->image.reset(static_cast<uint8_t*>(aligned_alloc(kPage, program->image_bytes)));
  memset(program->image.get(), 0, program->image_bytes);
  for (int k = 0; k < header->e_phnum; ++k) {
    const auto* segment = at<Elf64_Phdr>(elf, size, header->e_phoff + k * sizeof(Elf64_Phdr));
    if (segment->p_type != PT_LOAD || segment->p_filesz == 0) continue;
    at<uint8_t>(elf, size, segment->p_offset + segment->p_filesz - 1);
    memcpy(program->image.get() + segment->p_vaddr, static_cast<const uint8_t*>(elf) + segment->p_offset,
           segment->p_filesz);
  }
  memory.add(reinterpret_cast<uint64_t>(program->image.get()), program->image_bytes, false, false);
  read_instructions(*program, disassemble(elf, size, notes.architecture));

  // Symbols: a kernel's descriptor is the object NAME.kd.
  for (int k = 0; k < header->e_shnum; ++k) {
    const auto* section = at<Elf64_Shdr>(elf, size, header->e_shoff + k * sizeof(Elf64_Shdr));
    if (section->sh_type == SHT_RELA && section->sh_size) throw Fault("code object: relocations are not modelled");
    if (section->sh_type != SHT_DYNSYM) continue;
    const auto* strings = at<Elf64_Shdr>(elf, size, header->e_shoff + section->sh_link * sizeof(Elf64_Shdr));
    for (uint64_t s = 0; s < section->sh_size; s += sizeof(Elf64_Sym)) {
      const auto* symbol = at<Elf64_Sym>(elf, size, section->sh_offset + s);
      const std::string name = at<char>(elf, size, strings->sh_offset + symbol->st_name);
      if (name.size() < 3 || name.substr(name.size() - 3) != ".kd") {
        if (ELF64_ST_TYPE(symbol->st_info) == STT_OBJECT) program->objects[name] = {symbol->st_value, symbol->st_size};
        continue;
      }
      for (const jax_dsv4::rocm::KernelNotes& described : notes.kernels) {
        if (described.name + ".kd" != name) continue;
        Kernel kernel{described};
        const uint8_t* kd = program->image.get() + symbol->st_value;
        int64_t entry;
        memcpy(&kernel.lds_bytes, kd, 4);
        memcpy(&kernel.scratch_bytes, kd + 4, 4);
        memcpy(&entry, kd + 16, 8);
        memcpy(&kernel.rsrc1, kd + 48, 4);
        memcpy(&kernel.rsrc2, kd + 52, 4);
        memcpy(&kernel.properties, kd + 56, 2);
        memcpy(&kernel.preload, kd + 58, 2);
        // A kernel with preloaded arguments begins with 256 bytes for firmware that cannot preload; this one can.
        auto first = program->by_address.find(symbol->st_value + entry + (kernel.preload ? 256 : 0));
        if (first == program->by_address.end()) throw Fault("code object: " + kernel.name + " has no entry point");
        kernel.entry = first->second;
        program->kernels[kernel.name] = kernel;
      }
    }
  }
  return program;
}

}  // namespace gfx950
