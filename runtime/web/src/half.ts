const WORDS = new Uint32Array(1);
const NUMBER = new Float32Array(WORDS.buffer);

/** float32 numbers as IEEE 754 binary16 bits, rounded to nearest, ties to even. */
export function toFloat16(values: Float32Array): Uint16Array {
  return Uint16Array.from(values, (value) => {
    NUMBER[0] = value;
    const bits = WORDS[0]!;
    const sign = (bits >>> 16) & 0x8000;
    const magnitude = Math.abs(value);
    if (Number.isNaN(value)) return sign | 0x7e00;
    if (magnitude >= 65520) return sign | 0x7c00;
    if (magnitude < 2 ** -14) return sign | roundToEven(magnitude * 2 ** 24);
    const exponent = ((bits >>> 23) & 255) - 127;
    return sign | (((exponent + 14) << 10) + roundToEven((magnitude / 2 ** exponent) * 1024));
  });
}

/** binary16 bits as float32 numbers. */
export function toFloat32(halves: ArrayLike<number>): Float32Array {
  return Float32Array.from(halves, (half) => {
    const fraction = half & 1023;
    const exponent = (half >>> 10) & 31;
    const sign = half & 0x8000 ? -1 : 1;
    if (exponent === 31) return fraction > 0 ? NaN : sign * Infinity;
    return sign * (exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25));
  });
}

function roundToEven(value: number): number {
  const down = Math.floor(value);
  const rest = value - down;
  return rest > 0.5 || (rest === 0.5 && down % 2 === 1) ? down + 1 : down;
}
