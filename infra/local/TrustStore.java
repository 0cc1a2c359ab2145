import java.io.File;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.InputStream;
import java.io.OutputStream;
import java.security.KeyStore;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import java.util.Collections;

/** Writes a trust store of what Java trusts and what the machine's PEM bundle trusts: TrustStore BUNDLE STORE. */
public final class TrustStore {
    public static void main(String[] arguments) throws Exception {
        char[] password = "changeit".toCharArray();
        KeyStore all = KeyStore.getInstance("PKCS12");
        all.load(null, null);
        int count = 0;
        try {
            KeyStore java = KeyStore.getInstance(new File(System.getProperty("java.home"), "lib/security/cacerts"), password);
            for (String alias : Collections.list(java.aliases())) {
                if (java.isCertificateEntry(alias)) {
                    all.setCertificateEntry("ca" + count++, java.getCertificate(alias));
                }
            }
        } catch (Exception unreadable) {
            // A Java without a store of its own, or with another password: the bundle must do.
        }
        try (InputStream bundle = new FileInputStream(arguments[0])) {
            for (Certificate each : CertificateFactory.getInstance("X.509").generateCertificates(bundle)) {
                all.setCertificateEntry("ca" + count++, each);
            }
        }
        try (OutputStream store = new FileOutputStream(arguments[1])) {
            all.store(store, password);
        }
    }
}
