import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.security.SecureRandom;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicLong;

/**
 * A ledger of 819,200 entries of 256 bytes on the heap, filled at start-up, answered over HTTP.
 *
 * <p>In: GET /entry?row=N. Out: JSON with a hash of entry N. The entries follow from the row and from the token drawn at
 * start-up, so that loadgen/checks.py can compute what the hash must be.
 */
public final class Ledger {
    private static final int LONGS_PER_ENTRY = 32;
    private static final int ENTRIES_PER_PAGE = 4096;
    private static final int PAGES = 200;
    private static final long ROWS = (long) PAGES * ENTRIES_PER_PAGE;

    private static final long SEED = new SecureRandom().nextLong();
    private static final long[][] DATA = new long[PAGES][ENTRIES_PER_PAGE * LONGS_PER_ENTRY];
    private static final AtomicLong COUNT = new AtomicLong();

    private Ledger() {}

    /** splitmix64's output function. */
    private static long mix(long z) {
        z += 0x9E3779B97F4A7C15L;
        z = (z ^ (z >>> 30)) * 0xBF58476D1CE4E5B9L;
        z = (z ^ (z >>> 27)) * 0x94D049BB133111EBL;
        return z ^ (z >>> 31);
    }

    private static void fill() {
        long position = 0;
        for (long[] page : DATA) {
            for (int i = 0; i < page.length; i++) {
                page[i] = mix(SEED ^ position++);
            }
        }
    }

    private static long hash(long row) {
        long[] page = DATA[(int) (row / ENTRIES_PER_PAGE)];
        int start = (int) (row % ENTRIES_PER_PAGE) * LONGS_PER_ENTRY;
        long hash = 0;
        for (int i = start; i < start + LONGS_PER_ENTRY; i++) {
            hash = mix(hash ^ page[i]);
        }
        return hash;
    }

    private static void answer(HttpExchange exchange, int status, String body) throws IOException {
        byte[] payload = body.getBytes(StandardCharsets.UTF_8);
        exchange.getResponseHeaders().set("Content-Type", "application/json");
        // One connection per request: a connection frozen with the process would be dead after the restore.
        exchange.getResponseHeaders().set("Connection", "close");
        exchange.sendResponseHeaders(status, payload.length);
        exchange.getResponseBody().write(payload);
        exchange.close();
    }

    private static void entry(HttpExchange exchange) throws IOException {
        String query = exchange.getRequestURI().getQuery();
        long row = -1;
        try {
            row = query == null ? 0 : query.startsWith("row=") ? Long.parseLong(query.substring(4)) : -1;
        } catch (NumberFormatException notANumber) {
            row = -1;
        }
        if (row < 0) {
            answer(exchange, 404, "{\"error\": \"GET /entry?row=N, N = 0, 1, 2, …\"}");
            return;
        }
        answer(
                exchange,
                200,
                String.format(
                        "{\"function\": \"ledger\", \"token\": \"%016x\", \"row\": %d, \"value\": \"%016x\", \"count\": %d}",
                        SEED, row, hash(row % ROWS), COUNT.incrementAndGet()));
    }

    public static void main(String[] arguments) throws IOException {
        fill();
        HttpServer server = HttpServer.create(new InetSocketAddress("0.0.0.0", Integer.parseInt(arguments[0])), 128);
        server.createContext("/ready", exchange -> answer(exchange, 200, "{\"ready\": true}"));
        server.createContext("/entry", Ledger::entry);
        server.setExecutor(Executors.newFixedThreadPool(8));
        server.start();
        System.out.println("ledger of " + ROWS + " entries is ready");
    }
}
