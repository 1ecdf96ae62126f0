"""Repositories that BUILD needs and that come from this machine, not from the net."""

def _jaxlib_headers(ctx):
    python = ctx.os.environ.get("JAX_DSV4_PYTHON", "") or "python3"
    found = python if "/" in python else ctx.which(python)
    if not found:
        fail("jaxlib_headers: no {} on PATH; name an interpreter that has jax by --repo_env=JAX_DSV4_PYTHON=<path>".format(python))
    asked = ctx.execute([found, "-c", "import jax.ffi; print(jax.ffi.include_dir())"])
    if asked.return_code != 0:
        fail("jaxlib_headers: {} cannot import jax; name an interpreter that can by --repo_env=JAX_DSV4_PYTHON=<path>\n{}".format(
            found,
            asked.stderr,
        ))
    ctx.symlink(asked.stdout.strip(), "include")
    ctx.file("BUILD", """\
load("@rules_cc//cc:cc_library.bzl", "cc_library")

cc_library(
    name = "jaxlib_headers",
    hdrs = glob(["include/xla/ffi/api/*.h"]),
    includes = ["include"],
    visibility = ["//visibility:public"],
)
""")

# XLA's FFI headers, from the jaxlib of the interpreter that the environment variable JAX_DSV4_PYTHON names (default: python3).
jaxlib_headers = repository_rule(
    implementation = _jaxlib_headers,
    environ = ["JAX_DSV4_PYTHON", "PATH"],
    local = True,  # asked again by each Bazel server: another jaxlib may have been installed
)

_NATIVE_CC_RULES = [
    "cc_binary",
    "cc_import",
    "cc_library",
    "cc_proto_library",
    "cc_test",
    "cc_toolchain",
    "cc_toolchain_suite",
]

def _native_rules_cc(ctx):
    ctx.file("BUILD")
    ctx.file("cc/BUILD")
    ctx.file("cc/defs.bzl", "".join(["{0} = native.{0}\n".format(rule) for rule in _NATIVE_CC_RULES]))
    for rule in ["cc_binary", "cc_library"]:
        ctx.file("cc/{}.bzl".format(rule), "{0} = native.{0}\n".format(rule))

# Stands in for rules_cc where the C++ rules are part of Bazel: nothing to download, and Debian's rules_cc package cannot be used
# (0.0.4 asks its Bazel, 4.2.3, for a function that came with 5.0).
native_rules_cc = repository_rule(implementation = _native_rules_cc)
