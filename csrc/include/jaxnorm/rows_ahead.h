// Row-wise forward kernels whose blocks walk: the parts of rows.h, with the next rows of a block on their way to shared
// memory while one is worked on, and the weights read once a block instead of once a row.
#pragma once
#include "jaxnorm/rows.h"

namespace jaxnorm {

// BLOCKS blocks walk over the rows, DEPTH rows ahead of each. A lane alone reads the slots that it fills, so a slot is
// free, without a barrier, once the first pass over its row has taken all of it: the next copy starts before the row's
// sums are exchanged. A norm that exchanges once a row takes two buffers in turn: a barrier stands between the writing
// and the reading of one, none between its reading and the next writing.
template <class S, int DEPTH, int BLOCKS, class Source, class Norm, class Epilogue>
JN_DEV void forward_rows_ahead(const Source& source, const Norm& norm, Epilogue epilogue, u64 rows) {
  static_assert(S::REGS == S::PER && S::GROUPS == 1 && S::UNROLL == 1 && !S::Sum::in_wave,
                "a row a block, in registers");
  using OneRow = Row<S, Source, Norm::PIVOT>;
  using Stashed = typename OneRow::Stashed;
  constexpr int slot_bytes = S::REGS * Stashed::footprint, sum_bytes = Norm::BUFFERS * S::Sum::bytes;
  constexpr int turns = Norm::ONCE ? 2 : 1;
  const u32 lane = thread_id();
  unsigned char* stash = shared_memory() + turns * sum_bytes;

  auto fetch = [&](u64 row, u32 slot) {
#pragma unroll
    for (int k = 0; k < S::REGS; ++k)
      if (row < rows && S::has(k, lane))
        Stashed::fetch(source, stash + slot * slot_bytes + k * Stashed::footprint, lane, row * S::N + lane * S::V,
                       k * S::STEP);
    async_commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < DEPTH; ++ahead) fetch(block_x() + u64(ahead) * BLOCKS, ahead);
  epilogue.issue(lane);
  typename OneRow::Raw next;
  if constexpr (Norm::PIVOT)
    if (block_x() < rows) next = source.fetch(u64(block_x()) * S::N, 0, 0);
  u32 slot = 0, buffer = 0;
#pragma unroll 1
  for (u64 row = block_x(); row < rows; row += BLOCKS) {
    OneRow one{source, stash, row, row * S::N + lane * S::V, lane, true};
    if constexpr (Norm::PIVOT) {
      one.first = next;
      if (row + BLOCKS < rows) next = source.fetch((row + BLOCKS) * S::N, 0, 0);
    }
    async_wait<DEPTH - 1>();
#pragma unroll
    for (int k = 0; k < S::REGS; ++k) {
      if (one.has(k))
        one.raw[k] =
            Stashed::read(source, stash + slot * slot_bytes + k * Stashed::footprint, lane, one.column(), k * S::STEP);
      else
        one.raw[k] = typename OneRow::Raw{};
    }
    finish_row<S>(one, norm, epilogue, (float*)(shared_memory() + buffer),
                  [&] { fetch(row + u64(DEPTH) * BLOCKS, slot); });
    slot = slot == DEPTH - 1 ? 0 : slot + 1;
    if constexpr (turns > 1) buffer = sum_bytes - buffer;
  }
}

}  // namespace jaxnorm
