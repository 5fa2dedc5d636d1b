/** What cannot be used or does not hold, in a sentence that a person can read. */
export class Refusal extends Error {}
