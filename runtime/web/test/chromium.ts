export const CHROMIUM = process.env.REFT_WEB_CHROMIUM ?? "/usr/bin/chromium";

/** Arguments with which it does nothing of its own. */
export const QUIET = [
  "--no-sandbox",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
