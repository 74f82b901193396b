// A drawing becomes the 8 x 8 image that the digits of scikit-learn are: the drawing is moved to the
// middle, and each of 8 x 8 cells holds how much of it is ink, 0..1.

export const SIZE = 8;

/** The cells of a drawing: gray values 0..255 of a square image, row by row. */
export function cells(gray, side) {
  let left = side, right = -1, top = side, bottom = -1;
  for (let y = 0; y < side; ++y) {
    for (let x = 0; x < side; ++x) {
      if (gray[y * side + x] < 64) continue;
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = Math.max(bottom, y);
    }
  }
  const result = new Float32Array(SIZE * SIZE);
  if (right < 0) return null;
  // Digits of the training set fill the height, and are as wide as they are.
  const extent = Math.max(bottom - top + 1, (right - left + 1) * 1.2);
  const x0 = (left + right + 1 - extent) / 2, y0 = (top + bottom + 1 - extent) / 2;
  const samples = 8; // of a cell, in each direction
  for (let i = 0; i < SIZE * SIZE; ++i) {
    let sum = 0;
    for (let j = 0; j < samples * samples; ++j) {
      const u = ((i % SIZE) + ((j % samples) + 0.5) / samples) / SIZE;
      const v = (Math.floor(i / SIZE) + (Math.floor(j / samples) + 0.5) / samples) / SIZE;
      const x = Math.floor(x0 + u * extent), y = Math.floor(y0 + v * extent);
      if (x >= 0 && x < side && y >= 0 && y < side) sum += gray[y * side + x];
    }
    result[i] = Math.round((16 * sum) / (255 * samples * samples)) / 16;
  }
  return result;
}
