"""Subnormal numbers are zero while a kernel runs, in its operands and in its results; the caller's mode comes back.

x86 takes some hundred cycles for an operation on a subnormal number, and a layer whose products vanish meets millions
of them. Weights and activations do not need numbers below 1.2e-38, whose digits are fewer and fewer.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

# What starts threads outside of their parallel loops.
_LAUNCH = "pragma_parallel_launch_point"
_FLUSH, _RESTORE = "mc_opt_flush_subnormals", "mc_opt_restore_subnormals"

# MXCSR: bit 15 flushes results (FTZ), bit 6 operands (DAZ). FPCR: bit 24 (FZ) flushes both, of all but halves.
_TEXTS = {
    "x86_64": f"""
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define i64 @{_FLUSH}() {{
  %place = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %place)
  %mode = load i32, ptr %place
  %flushing = or i32 %mode, {1 << 15 | 1 << 6}
  store i32 %flushing, ptr %place
  call void @llvm.x86.sse.ldmxcsr(ptr %place)
  %result = zext i32 %mode to i64
  ret i64 %result
}}
define i64 @{_RESTORE}(i64 %mode) {{
  %place = alloca i32
  %word = trunc i64 %mode to i32
  store i32 %word, ptr %place
  call void @llvm.x86.sse.ldmxcsr(ptr %place)
  ret i64 0
}}
""",
    "aarch64": f"""
declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)
define i64 @{_FLUSH}() {{
  %mode = call i64 @llvm.aarch64.get.fpcr()
  %flushing = or i64 %mode, {1 << 24}
  call void @llvm.aarch64.set.fpcr(i64 %flushing)
  ret i64 %mode
}}
define i64 @{_RESTORE}(i64 %mode) {{
  call void @llvm.aarch64.set.fpcr(i64 %mode)
  ret i64 0
}}
""",
}


def llvm_text(triple: str) -> str:
    """The definitions of what flushed kernels call, for the architecture of a target's triple."""
    return _TEXTS[triple.split("-")[0]]


def flushed(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """A lowered kernel that flushes where it computes: behind the checks of its arguments, in each of its threads."""
    return function.with_body(_entered(function.body))


def _entered(statement: Any) -> Any:
    """The statement with what lies in the scope of computation flushed."""
    if isinstance(statement, tirx.AttrStmt) and statement.attr_key == "compute_scope":
        body = _around(_in_threads(statement.body))
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, body)
    return rebuilt(statement, _entered)


def _in_threads(statement: Any) -> Any:
    """The statement with each parallel loop flushed where a thread enters its share of the loop."""
    if isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL:
        zero = tvm.tirx.IntImm("int32", 0)
        return tirx.AttrStmt(zero, _LAUNCH, zero, _around(statement))
    if isinstance(statement, tirx.AttrStmt) and statement.attr_key == _LAUNCH:  # a kernel that starts threads itself
        return tirx.AttrStmt(statement.node, _LAUNCH, statement.value, _around(statement.body))
    return rebuilt(statement, _in_threads)


def _around(body: Any) -> Any:
    mode = tirx.Var("mode", "int64")
    return tirx.SeqStmt(
        [
            tirx.Bind(mode, tirx.call_extern("int64", _FLUSH)),
            body,
            tirx.Evaluate(tirx.call_extern("int64", _RESTORE, mode)),
        ]
    )


def rebuilt(statement: Any, change: Any) -> Any:
    """The statement with its parts changed."""
    match statement:
        case tirx.SeqStmt():
            return tirx.SeqStmt([change(part) for part in statement.seq])
        case tirx.AttrStmt():
            return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, change(statement.body))
        case tirx.IfThenElse():
            other = None if statement.else_case is None else change(statement.else_case)
            return tirx.IfThenElse(statement.condition, change(statement.then_case), other)
        case tirx.For():
            loop = (statement.loop_var, statement.min, statement.extent, statement.kind)
            body = change(statement.body)
            return tirx.For(*loop, body, statement.thread_binding, statement.annotations, statement.step)
        case tirx.While():
            return tirx.While(statement.condition, change(statement.body))
        case _:
            return statement
