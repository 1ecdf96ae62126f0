// A software gfx950: the state of a wave, a workgroup and a launch, and what an instruction is once decoded.
//
// The address space is the host's own: a device pointer is a host pointer, and every access is checked against the
// ranges declared live (memory.h). docs/software-gfx950.md says what is modelled and what is not.
#ifndef JAX_DSV4_TESTS_GFX950_MACHINE_H_
#define JAX_DSV4_TESTS_GFX950_MACHINE_H_

#include <array>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "rocm/code_object.h"

namespace gfx950 {

constexpr int kLanes = 64;
constexpr int kVgprs = 512;  // v0..v255, then the accumulation registers a0..a255
constexpr int kAccum = 256;
constexpr int kSgprs = 128;
constexpr int kVcc = 106, kM0 = 124, kExec = 126;  // numbers in the scalar operand space
// What the machine is: gfx950, or what GFX950_ARCHITECTURE says, of which gfx942 can run programs too.
std::string architecture();
inline int lds_bytes() { return architecture() == "gfx942" ? 65536 : 163840; }
// Where LDS and a lane's own memory begin among flat addresses: above all that a pointer of the host's can be.
constexpr uint64_t kSharedAperture = uint64_t{1} << 56, kPrivateAperture = uint64_t{1} << 57;
constexpr uint64_t kAddressMask = (uint64_t{1} << 48) - 1;

// What a wait counter can hold; issue stalls when it is full.
constexpr int kMaxVm = 63, kMaxLgkm = 15;
// Instructions of the issuing wave until a memory operation lands, unless a wait asks for it earlier. The ratio is what
// matters: AITER's 64-head kernel reads registers that an already issued load will overwrite.
constexpr int kLdsLatency = 8, kVmLatency = 160;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Lanes = std::array<uint32_t, kLanes>;

struct Operand {
  enum Kind : uint8_t { kNone, kVgpr, kSgpr, kConstant, kScc, kVccz, kExecz, kOff } kind = kNone;
  bool negate = false, absolute = false, sign_extend = false;
  int reg = 0, count = 1;  // first register and how many
  uint32_t bits32 = 0;     // a constant as each width of operand reads it
  uint64_t bits64 = 0;
};

enum class Counter : uint8_t { kVm, kLgkm };
enum class Class : uint8_t { kScalar, kVector, kMatrix, kLds, kGlobal, kScalarMemory, kControl, kCount };

struct Wave;

struct Instruction {
  void (*execute)(Wave&, const Instruction&) = nullptr;
  uint64_t address = 0;
  Class kind = Class::kScalar;
  std::vector<Operand> operands;  // destination first, as in the text
  int offset = 0, offset1 = 0;
  uint16_t immediate = 0;  // SOPP's and SOPK's simm16, from the encoding
  int target = -1;         // index of the instruction that a branch goes to
  uint8_t op_sel = 0, op_sel_hi = 0xff, neg_lo = 0, neg_hi = 0;
  bool lds = false, offen = false, returns = false, clamp = false, nontrivial = false, not_modelled = false;
  uint8_t gpr_index_mode = 0, bitop3 = 0;
  float scale = 1.0f;  // omod
  // DPP: the lane that each lane's first source comes from, -1 where there is none, and the lanes it may write.
  std::shared_ptr<const std::array<int8_t, kLanes>> dpp;
  std::shared_ptr<const Lanes> dpp_write;
  bool bound_ctrl = false;
  // SDWA: which byte or word of an operand is meant. kDword: all of it.
  enum Select : uint8_t { kByte0, kByte1, kByte2, kByte3, kWord0, kWord1, kDword };
  bool sdwa = false, sdwa_preserve = false, sdwa_sign_extend = false;
  Select select_dst = kDword, select_src[2] = {kDword, kDword};
  std::string text;
};

// A kernel: what its notes say (ffi/rocm/code_object.h), and what its descriptor says.
struct Kernel : jax_dsv4::rocm::KernelNotes {
  int entry = 0;  // index into Program::instructions
  uint32_t lds_bytes = 0, scratch_bytes = 0, rsrc1 = 0, rsrc2 = 0;
  uint16_t properties = 0, preload = 0;
};

// A variable of a code object.
struct Object {
  uint64_t offset = 0, bytes = 0;
};

// A loaded code object.
struct Program {
  struct Free {
    void operator()(uint8_t* p) const { free(p); }
  };
  std::vector<Instruction> instructions;
  std::map<uint64_t, int> by_address;
  std::map<std::string, Kernel> kernels;
  std::map<std::string, Object> objects;
  std::unique_ptr<uint8_t[], Free> image;  // PT_LOAD segments, on a page's boundary; code reads its constants here
  uint64_t image_bytes = 0;
};

// A memory operation under way: its values were read when it was issued and reach their registers (or LDS, for a
// direct-to-LDS load) when it lands.
struct Pending {
  uint64_t sequence = 0, due = 0, address = 0;
  Counter counter = Counter::kVm;
  enum Target : uint8_t { kNothing, kVgprs, kSgprs, kLds } target = kNothing;
  int reg = 0, count = 0;
  uint32_t keep = 0;                   // bits of the old register that stay (16-bit loads into one half)
  uint64_t lanes = 0;                  // EXEC at issue
  std::array<uint32_t, kLanes> where;  // LDS byte address of each lane
  std::array<Lanes, 4> data;
  std::array<uint32_t, 16> scalars;
};

// What the hazard mode knows of one counter of a wave.
struct Wait {
  uint64_t issued = 0, complete = 0;           // sequence numbers; 1 .. complete are certainly done
  uint64_t scalar_complete = 0;                // scalar loads return out of order, so only a wait for 0 covers them
  uint64_t last_address = 0, last_issued = 0;  // the last wait on it, and what had been issued by then
  int last_value = -1;
};

struct Counters {
  uint64_t by_class[static_cast<int>(Class::kCount)] = {};
  uint64_t instructions = 0, workgroups = 0, launches = 0;
  uint64_t bytes_read = 0, bytes_written = 0, lds_bytes_read = 0, lds_bytes_written = 0;

  Counters& operator+=(const Counters& other) {
    for (int k = 0; k < static_cast<int>(Class::kCount); ++k) by_class[k] += other.by_class[k];
    instructions += other.instructions, workgroups += other.workgroups, launches += other.launches;
    bytes_read += other.bytes_read, bytes_written += other.bytes_written;
    lds_bytes_read += other.lds_bytes_read, lds_bytes_written += other.lds_bytes_written;
    return *this;
  }
};

struct Workgroup;

struct Wave {
  alignas(64) std::array<Lanes, kVgprs> v;
  std::array<uint32_t, kSgprs> s{};
  alignas(64) Lanes exec_lanes;  // EXEC as a mask per lane, kept beside s[126:127]
  bool scc = false, exec_full = true;
  bool done = false, at_barrier = false;
  bool gpr_index = false, hazards = false;
  int pc = 0, id = 0;
  uint64_t clock = 0;
  std::deque<std::unique_ptr<Pending>> pending[2];  // by Counter, in order of issue
  Wait wait[2];
  Workgroup* group = nullptr;
  // Hazard mode: sequence number of the load that will write a register, 0 if none.
  std::array<uint64_t, kVgprs> guard_vm{}, guard_lgkm{};
  std::array<uint64_t, kSgprs> guard_scalar{};
  std::map<uint64_t, uint64_t> issue_address[2];  // sequence -> address of the instruction

  uint64_t exec() const { return s[kExec] | uint64_t{s[kExec + 1]} << 32; }
  void set_exec(uint64_t mask);
  void set_scalar(int reg, uint32_t value);
  bool active(int lane) const { return exec_lanes[lane] != 0; }
};

// Hazard mode: who last touched a dword of LDS.
struct LdsWord {
  uint64_t sequence = 0, write_address = 0, read_address = 0;
  int32_t write_epoch = -1, read_epoch = -1;
  int8_t writer = -1, reader = -1;  // reader -2: more than one
  Counter counter = Counter::kLgkm;
};

struct Launch;

struct Workgroup {
  Launch* launch = nullptr;
  std::vector<std::unique_ptr<Wave>> waves;
  std::vector<uint8_t> lds;
  std::vector<LdsWord> lds_words;
  int epoch = 0;                                             // barriers passed
  std::vector<std::vector<std::array<Wait, 2>>> at_barrier;  // [wave][barrier]: what it had waited for
  uint64_t instructions = 0;
};

// How lazily the machine may run, and what it looks for.
struct Options {
  bool hazards = false;     // report waits that do not cover the data they guard
  bool exact_lgkm = false;  // honour lgkmcnt(n) for n > 0 instead of draining
  int lds_latency = kLdsLatency, vm_latency = kVmLatency;
};

struct Launch {
  const Program* program = nullptr;
  const Kernel* kernel = nullptr;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  std::vector<uint8_t> kernarg;
  std::vector<uint8_t> scratch;  // of one workgroup: `scratch_bytes` of the kernel for each lane
  int dynamic_lds_bytes = 0;     // behind what the kernel declares
  Memory* memory = nullptr;
  Options options;
  Counters counters;
  std::vector<uint64_t> instructions_by_workgroup;
  std::map<std::string, uint64_t> hazards;  // text -> how often
  const Memory::Range* recent = nullptr;    // where the last access was
};

void run(Launch& launch);  // throws Fault
[[noreturn]] void fault(const Wave& wave, const Instruction& i, const std::string& what);

// What instructions.cc needs of the machine.
void issue(Wave& w, const Instruction& i, std::unique_ptr<Pending> op);
void complete(Wave& w, Counter counter, int outstanding);  // deliver until at most this many are under way
void wait_for(Wave& w, const Instruction& i, Counter counter, int outstanding);
void uses_vgprs(Wave& w, const Instruction& i, int reg, int count);
void uses_sgprs(Wave& w, const Instruction& i, int reg, int count);
void reads_lds(Wave& w, const Instruction& i, uint32_t address, uint32_t bytes);
void writes_lds(Wave& w, const Instruction& i, uint32_t address, uint32_t bytes, Counter counter, uint64_t sequence);
uint8_t* locate(Wave& w, const Instruction& i, uint64_t address, uint32_t bytes, bool writes);

// instructions.cc: the entry for a mnemonic (suffixes _e32, _e64, _dpp, _sdwa taken off), or null.
struct Opcode {
  void (*execute)(Wave&, const Instruction&);
  Class kind;
};
const Opcode* find_opcode(const std::string& mnemonic);

// program.cc
std::shared_ptr<Program> load_program(const void* elf, size_t size, Memory& memory);  // throws Fault

}  // namespace gfx950

#endif  // JAX_DSV4_TESTS_GFX950_MACHINE_H_
