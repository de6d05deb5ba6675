// The C interface of the row kernels: checks what it is given, and hands it to the chosen instruction set.
#include "dispatch.h"

using namespace longspan;

namespace {

constexpr int64_t MOST = int64_t{1} << 40;  // of rows and of columns: keeps their products with sizes in range

bool is_matrix(const longspan_matrix& matrix) {
  return matrix.data && (matrix.dtype == LONGSPAN_F32 || matrix.dtype == LONGSPAN_BF16);
}

bool is_matrix_or_absent(const longspan_matrix& matrix) { return !matrix.data || is_matrix(matrix); }

bool is_call(int64_t rows, int64_t width, const longspan_product* from, const longspan_result* to) {
  if (rows < 0 || rows > MOST || width < 1 || width > MOST / (rows + 1) || !from || !to) return false;
  if (rows == 0) return true;
  return is_matrix(from->data) && is_matrix_or_absent(to->out) && (to->out.data || to->quantized) &&
         (!to->quantized || to->scale);
}

bool is_norm(const longspan_norm* norm) {
  return norm && norm->weight && is_matrix_or_absent(norm->residual) && is_matrix_or_absent(norm->sum);
}

bool is_rotary(const longspan_rotary* rotary, int64_t width) {
  return rotary && rotary->cos && rotary->sin && rotary->heads >= 0 && rotary->head_width >= 2 &&
         rotary->head_width % 2 == 0 && rotary->heads <= width / rotary->head_width;
}

}  // namespace

extern "C" {

int longspan_rows_copy(int64_t rows, int64_t width, const longspan_product* from, const longspan_result* to) {
  return is_call(rows, width, from, to) ? row_kernels().copy(rows, width, *from, *to) : LONGSPAN_BAD_ARGUMENT;
}

int longspan_rows_activate(int64_t rows, int64_t width, const longspan_product* from, int32_t activation, int32_t gated,
                           const longspan_result* to) {
  const bool is_known = activation >= LONGSPAN_GELU && activation <= LONGSPAN_SILU && (gated == 0 || gated == 1);
  return is_known && is_call(rows, width, from, to)
             ? row_kernels().activate(rows, width, *from, activation, gated, *to)
             : LONGSPAN_BAD_ARGUMENT;
}

int longspan_rows_normalize(int64_t rows, int64_t width, const longspan_product* from, const longspan_norm* norm,
                            const longspan_result* to) {
  return is_norm(norm) && is_call(rows, width, from, to) ? row_kernels().normalize(rows, width, *from, *norm, *to)
                                                         : LONGSPAN_BAD_ARGUMENT;
}

int longspan_rows_rotate(int64_t rows, int64_t width, const longspan_product* from, const longspan_rotary* rotary,
                         const longspan_result* to) {
  return is_rotary(rotary, width) && is_call(rows, width, from, to)
             ? row_kernels().rotate(rows, width, *from, *rotary, *to)
             : LONGSPAN_BAD_ARGUMENT;
}
}
