/** Something that the user can put right; the message says how. */
export class ReftEdgeError extends Error {
  override name = "ReftEdgeError";
}
