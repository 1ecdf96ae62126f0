#include "rocm/aiter.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <sstream>

#include "rocm/code_object.h"

namespace jax_dsv4::rocm {
namespace {

// One 16-byte slot each; the names are those of AITER's host code. What a kernel takes is the same in every version.
enum Slot : int {
  kPartialOut = 0x00,
  kPartialLse = 0x10,
  kQ = 0x20,
  kKv = 0x30,
  kKvIndptr = 0x40,  // not read with a plan
  kKvIndices = 0x50,
  kLastPageLens = 0x60,  // not read at page size 1
  kSoftmaxScale = 0x70,
  kMqa = 0x80,
  kKvSplit = 0x90,
  kQBytes = 0xa0,
  kKvBytes = 0xb0,
  kLog2Page = 0xc0,
  kQoIndptr = 0xd0,
  kWork = 0xe0,
  kOut = 0xf0,
  kBytesOfFirstBf16 = 0x100,  // what the wheel of 2025 takes: no scales
  kQScale = 0x100,
  kKvScale = 0x110,
  kBytesOfFirst = 0x120,
  kOut16NoSplit = 0x120,
  kLse = 0x130,
  kBytesOfLseBf16 = 0x160,
  kBytesWithLse = 0x180,  // lse, and context parallelism: a pointer and two numbers, of which the first is a count
  kContextRanks = 0x150,
};
constexpr int kPointers[] = {kPartialOut, kPartialLse,   kQ,        kKv,   kKvIndptr,
                             kKvIndices,  kLastPageLens, kQoIndptr, kWork, kOut};
constexpr int kScales[] = {kQScale, kKvScale};
constexpr int kNumbers[] = {kSoftmaxScale, kMqa, kKvSplit, kQBytes, kKvBytes, kLog2Page};

struct Known {
  const char* name;
  Layout layout;
  int heads;
  bool any_heads, reports_lse;
  int fewest, most;  // heads of a call that it is taken for
  const char* architecture = "gfx950";
};
constexpr Layout kFp8 = Layout::kAiterFp8, kFnuz = Layout::kAiterFp8Fnuz, kBf16 = Layout::kAiterBf16;
// In order of preference. Left out: the fp8 kernel of 32 heads, whose lse of unsplit rows is never written and which
// wraps at 4 GiB; the bf16 ones of 64 (qh64_qseqlen1_gqaratio64), which put 0 in the place of every number of the
// output beyond 64, and of NaN; and gfx942's fp8 ones of 64, which were reported to fault (aiter#4363, aiter#4957).
// Those of 64 heads and more report an unsplit row of NaN as an empty one: their lse is taken from partial results
// alone. The bf16 one of 128 takes any smaller number of heads; from 17 on it costs less than passes of 16.
constexpr Known kKnown[] = {
    {"mla_a8w8_qh32_qseqlen4_gqaratio32_lse_ps", kFp8, 128, false, false, 128, 128},
    {"mla_a8w8_qh16_qseqlen4_gqaratio16_lse_v3_ps", kFp8, 64, false, false, 64, 64},
    {"mla_a8w8_qh16_qseqlen1_gqaratio16_lse_ps", kFp8, 16, false, true, 1, kMaxHeads},
    {"mla_a8w8_qh16_qseqlen1_gqaratio16_ps", kFp8, 16, false, false, 1, kMaxHeads},
    {"mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_lse_ps", kBf16, 16, false, true, 1, 16},
    {"mla_a16w16_qh32_qseqlen4_gqaratio32_lse_ps", kBf16, 128, true, false, 1, kMaxHeads},
    {"mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps", kBf16, 16, false, false, 1, kMaxHeads},
    {"mla_a8w8_qh128_m32x4_n16x2_msk0_ps", kFnuz, 128, false, false, 128, 128, "gfx942"},
    {"mla_a8w8_qh16_qseqlen1_gqaratio16_ps", kFnuz, 16, false, false, 1, kMaxHeads, "gfx942"},
    {"mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps", kBf16, 16, false, false, 1, kMaxHeads, "gfx942"},
};

// These kernels load the slots of an item's second 16 keys, then 18 rows, and wait until 19 loads are under way: the
// first of them may not have landed when it is used. The loop's own waits are for 18, and so is this one made.
constexpr uint32_t kWaitFor19 = 0xBF8C4073, kWaitFor18 = 0xBF8C4072;  // s_waitcnt vmcnt(n) lgkmcnt(0)
constexpr Mend kMends[] = {
    {0xe9d72b8633d4a380, 0x21f4, kWaitFor19, kWaitFor18},  // gfx950, _ps, of the wheel of 2025 and of e404860
    {0x4f33413da49c7ec8, 0x21f4, kWaitFor19, kWaitFor18},  // gfx942, the same
    {0xe5fdb498ca36f178, 0x2524, kWaitFor19, kWaitFor18},  // gfx950, _lse_ps, of e404860
    {0xeccc7bd0cf9524b4, 0x2830, kWaitFor19, kWaitFor18},  // gfx942, fp8 of 128 heads, of both
};

std::string& directory() {
  static std::string* path = new std::string;
  return *path;
}

// What AITER calls a layout's numbers.
const char* type_name(Layout layout) { return layout == kBf16 ? "bf16" : "fp8"; }

// AITER's list of kernels, where it has one: name of the file -> type and symbol, for persistent decode kernels.
std::map<std::string, std::string> read_registry(const std::string& folder, bool* exists) {
  std::map<std::string, std::string> symbols;
  std::ifstream in(folder + "/mla_asm.csv");
  *exists = in.good();
  std::vector<std::string> columns;
  for (std::string line; std::getline(in, line);) {
    std::vector<std::string> cells;
    std::stringstream row(line);
    for (std::string cell; std::getline(row, cell, ',');) cells.push_back(cell);
    if (columns.empty()) {
      columns = cells;
      continue;
    }
    std::map<std::string, std::string> entry;
    for (size_t i = 0; i < cells.size() && i < columns.size(); ++i) entry[columns[i]] = cells[i];
    // gfx942's list has no column cprr.
    const bool fits = entry["qType"] == entry["kvType"] && entry["ps"] == "1" && entry["prefill"] == "0" &&
                      (!entry.count("cprr") || entry["cprr"] == "0");
    if (fits) symbols[entry["co_name"]] = entry["qType"] + " " + entry["knl_name"];
  }
  return symbols;
}

bool has_argument(const KernelNotes& notes, int offset, int bytes) {
  for (const KernelArgument& a : notes.arguments) {
    if (a.offset == offset && a.size == bytes) return true;
  }
  return false;
}

// Whether the notes describe the arguments that pack_arguments fills in.
bool knows_abi(const KernelNotes& notes, const Known& known, std::string* reason) {
  const auto fail = [&](const std::string& what) {
    *reason = "its argument list is not one that is known (" + what + ")";
    return false;
  };
  const bool bf16 = known.layout == kBf16;
  const int bytes = notes.kernarg_bytes;
  if (bytes != (bf16 ? kBytesOfFirstBf16 : kBytesOfFirst) && !(bf16 && bytes == kBytesOfLseBf16) &&
      bytes != kBytesWithLse) {
    return fail(std::to_string(notes.kernarg_bytes) + " bytes");
  }
  for (int offset : kPointers) {
    if (!has_argument(notes, offset, 8)) return fail("no pointer at " + std::to_string(offset));
  }
  for (int offset : kScales) {
    if (!bf16 && !has_argument(notes, offset, 8)) return fail("no pointer at " + std::to_string(offset));
  }
  for (int offset : kNumbers) {
    if (!has_argument(notes, offset, 4)) return fail("no number at " + std::to_string(offset));
  }
  if (known.reports_lse && !has_argument(notes, kLse, 8)) return fail("no pointer to the lse");
  if (notes.required_workgroup[0] != kThreads)
    return fail("workgroups of " + std::to_string(notes.required_workgroup[0]));
  return true;
}

struct Candidates {
  std::vector<AiterKernel> kernels;
  std::string reasons;  // why others are not among them
};

Candidates find_kernels(const std::string& architecture) {
  Candidates found;
  if (architecture != "gfx950" && architecture != "gfx942") {
    found.reasons = "AITER's kernels are driven on gfx950 and gfx942 only; this is " + architecture;
    return found;
  }
  if (directory().empty()) {
    found.reasons =
        "AITER is not installed (pip install --no-deps amd-aiter, or name its hsa directory in JAX_DSV4_AITER_HSA)";
    return found;
  }
  const std::string folder = directory() + "/" + architecture + "/mla";
  bool has_registry = false;
  const std::map<std::string, std::string> registry = read_registry(folder, &has_registry);
  for (const Known& known : kKnown) {
    const std::string name = std::string(known.name) + ".co", file = folder + "/" + name;
    std::ifstream in(file, std::ios::binary);
    if (!in || architecture != known.architecture) continue;
    const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    CodeObjectNotes notes;
    std::string reason;
    bool ok = read_notes(bytes.data(), bytes.size(), &notes, &reason);
    if (ok && notes.architecture != architecture) ok = false, reason = "it is for another architecture";
    if (ok && notes.kernels.size() != 1)
      ok = false, reason = "it holds " + std::to_string(notes.kernels.size()) + " kernels";
    if (ok && !knows_abi(notes.kernels[0], known, &reason)) ok = false;
    if (ok && has_registry) {
      const auto listed = registry.find(name);
      if (listed == registry.end())
        ok = false, reason = "AITER's registry does not list it as a persistent decode kernel";
      else if (listed->second != type_name(known.layout) + (" " + notes.kernels[0].name))
        ok = false, reason = "AITER's registry names another type or symbol";
    }
    if (!ok) {
      found.reasons += (found.reasons.empty() ? "" : "; ") + file + ": " + reason;
      continue;
    }
    AiterKernel kernel;
    kernel.file = file;
    kernel.symbol = notes.kernels[0].name;
    for (const Mend& mend : kMends) {
      if (mend.sum == sum_of(bytes)) kernel.mend = &mend;
    }
    kernel.layout = known.layout;
    kernel.heads = known.heads;
    kernel.any_heads = known.any_heads;
    kernel.fewest = known.fewest, kernel.most = known.most;
    kernel.reports_lse = known.reports_lse;
    kernel.kernarg_bytes = notes.kernels[0].kernarg_bytes;
    // The 16-head fp8 kernel was rewritten when the argument list grew: tiles of 128 keys, 64-bit offsets. The bf16
    // ones work on 16 (16 heads) and 32 keys at a time; a cut costs more than finer ones would save.
    const bool rewritten = kernel.kernarg_bytes == kBytesWithLse;
    kernel.wraps_at_4gib = !rewritten;
    kernel.tile = is_fp8(known.layout) && known.heads == 16 && rewritten ? 128 : 64;
    found.kernels.push_back(kernel);
  }
  if (found.kernels.empty() && found.reasons.empty())
    found.reasons = folder + " has none of the kernels that are known";
  return found;
}

}  // namespace

void set_aiter_directory(const std::string& hsa) { directory() = hsa; }

const AiterKernel* choose_kernel(const std::string& architecture, Layout layout, int heads, int64_t pool_bytes,
                                 std::string* reason) {
  static std::mutex* mutex = new std::mutex;
  static auto* found = new std::map<std::string, Candidates>;
  const std::lock_guard<std::mutex> lock(*mutex);
  auto it = found->find(architecture);
  if (it == found->end()) it = found->emplace(architecture, find_kernels(architecture)).first;
  const Candidates& candidates = it->second;
  if (is_fp8(layout) && !candidates.kernels.empty() && (architecture == "gfx942") != (layout == kFnuz)) {
    const bool gfx942 = architecture == "gfx942";
    *reason = "AITER's fp8 kernels take " + std::string(gfx942 ? "e4m3fnuz on gfx942, layout aiter_fp8_fnuz"
                                                               : "e4m3fn on " + architecture + ", layout aiter_fp8");
    return nullptr;
  }
  const bool large = pool_bytes >= int64_t{1} << 32;
  bool too_large = false;
  for (const AiterKernel& kernel : candidates.kernels) {
    if (kernel.layout != layout || heads < kernel.fewest || heads > kernel.most) continue;
    if (large && kernel.wraps_at_4gib) {
      too_large = true;
      continue;
    }
    return &kernel;
  }
  *reason = too_large ? "the installed AITER's kernel wraps at 4 GiB and the cache has " + std::to_string(pool_bytes) +
                            " bytes; use kernels from an AITER source tree (JAX_DSV4_AITER_HSA)"
            : candidates.kernels.empty() || !candidates.reasons.empty()
                ? candidates.reasons
                : std::string("no ") + type_name(layout) + " kernel for " + std::to_string(heads) + " heads";
  return nullptr;
}

std::vector<uint8_t> pack_arguments(const AiterKernel& kernel, const DecodeScopeParams& p) {
  std::vector<uint8_t> packed(kernel.kernarg_bytes);
  const auto put = [&](int slot, auto value) {
    if (slot + sizeof value <= packed.size()) std::memcpy(&packed[slot], &value, sizeof value);
  };
  put(kPartialOut, p.partial_out);
  put(kPartialLse, p.partial_lse);
  put(kQ, p.q_packed);
  put(kKv, p.pool);
  put(kKvIndices, p.rows);
  put(kSoftmaxScale, p.scale);
  put(kMqa, int32_t{p.kernel_heads});
  put(kKvSplit, int32_t{1});
  put(kQBytes, int32_t{p.kernel_heads * row_bytes(p.layout)});
  put(kKvBytes, int32_t{row_bytes(p.layout)});
  put(kLog2Page, int32_t{0});
  put(kQoIndptr, p.qo_indptr);
  put(kWork, p.work_pointers);
  put(kOut, p.out);
  if (is_fp8(p.layout)) put(kQScale, p.scales), put(kKvScale, p.scales + 1);
  put(kOut16NoSplit, int64_t{1});
  put(kLse, p.lse);
  put(kContextRanks, int32_t{1});
  return packed;
}

}  // namespace jax_dsv4::rocm
